"""``export``: a LLaVAR from any of three layouts to any other, from disk to disk.

``llavar``    ours: ``build_model``, ``Trainer``, ``ask``
``original``  as LLaVAR was released: loads in the original's code; holds no tower
``hf-llava``  stock ``transformers.LlavaForConditionalGeneration`` with processor and chat template: ``pipeline``, vLLM
              and SGLang serve it without this package
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llavar_peft.atomic_files import write_json
from llavar_peft.constants import MODEL_TYPE, RELEASED_MODEL_TYPE
from llavar_peft.errors import ConfigError
from llavar_peft.models.auto_classes import register
from llavar_peft.models.build import expected_shapes, processor_of
from llavar_peft.models.checkpoint_loading import read_checkpoint, resolve_folder
from llavar_peft.models.hf_llava import write_stock_companions
from llavar_peft.models.model_parts import Parts
from llavar_peft.recipe.schema import ModelConfig
from llavar_peft.weights.adapter.adapter_files import ADAPTER_CONFIG
from llavar_peft.weights.delta.released_layout import ReleasedView, copy_companions, flatten_config, read_model_config
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.convert_layout import ACTIVATIONS, ProjectorForm, to_two_layers, write_converted
from llavar_peft.weights.io.folder_writer import WeightsReport
from llavar_peft.weights.io.shard_layout import RELEASED_SHARD_SIZE, WeightsFormat
from llavar_peft.weights.io.tensor_blocks import check_tensors
from llavar_peft.weights.io.tensor_table import TensorEntry, read_tensor_table
from llavar_peft.weights.io.write_weights import Progress

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Layout = Literal["llavar", "original", "hf-llava"]
_FLOAT16 = "float16"


def export(  # noqa: PLR0913 - each is a choice of the caller's
    source: str | Path,
    out: str | Path,
    *,
    to: Layout,
    vision_tower: str | Path | None = None,
    tokenizer: str | Path | None = None,
    projector: ProjectorForm = "linear",
    dtype: str | None = None,
    form: WeightsFormat | None = None,
    shard_size: int = RELEASED_SHARD_SIZE,
    progress: Progress | None = None,
) -> WeightsReport:
    """Write a LLaVAR in another layout.

    No model is built; killed or out of disk, the same call goes on where it was. Stock LLaVA prepares images as
    LLaVAR is trained (``pad``); ``pad_black`` of ``run_llava`` is not known there.

    Args:
        source: Folder (or hub name) of a LLaVAR in any of the three layouts.
        out: Folder to make; must not exist.
        to: The layout of the result.
        vision_tower: CLIP's folder, for a source in the released layout, which holds none.
        tokenizer: Folder with LLaMA's ``tokenizer.model``, which the original's code opens; for ``original`` from a
            source that has none.
        projector: How ``hf-llava`` holds the one linear layer: ``"linear"``, or ``"two-sided"`` for vLLM.
        dtype: Of the result, by torch's name; None keeps each tensor's own (``original``: float16, as released).
        form: ``"safetensors"`` or ``"bin"``; None is the latter for ``original`` and the former otherwise.
        shard_size: Bytes of a file at most.
        progress: Told after each tensor how many bytes are written, and of how many.

    Returns:
        What was written.

    Raises:
        ConfigError: No LLaVAR, a tower that is not named, or ``out`` exists.
        WeightsError: Tensors that are missing, misshapen, damaged or not finite; a stock LLaVA with a projector that is
            not linear.
        InterruptedRunError: Ctrl-C.
        EnvironmentFaultError: The disk is full, or another process writes the same folder.
    """
    register()
    folder = resolve_folder(str(source), "source")
    if (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError.at(str(folder), "is an adapter, expected a whole model", "merge it first: llavar-peft merge")
    parts = read_checkpoint(ModelConfig(checkpoint=str(folder), vision_tower=_text(vision_tower)))
    check_tensors(parts.tensors, expected_shapes(parts.config), where=parts.source)
    tensors = _entries(folder, vision_tower, parts)
    if to == "original":
        tensors = {new: one for name, one in tensors.items() if (new := tensor_names.to_released(name)) is not None}
        folders = (Path(tokenizer), folder) if tokenizer is not None else (folder,)
        finish = partial(_finish_original, parts, folder, folders)
    elif to == "hf-llava":
        layers = to_two_layers(
            parts.tensors[tensor_names.PROJECTOR_WEIGHT], parts.tensors[tensor_names.PROJECTOR_BIAS], projector
        )
        kept = {name: one for name, one in tensors.items() if not name.startswith("model.multi_modal_projector.")}
        tensors = {tensor_names.to_stock(name): one for name, one in {**kept, **layers}.items()}
        finish = partial(write_stock_companions, parts, ACTIVATIONS[projector], dtype)
    else:
        finish = partial(_finish_ours, parts, dtype)
    return write_converted(
        tensors,
        Path(out),
        dtype=dtype or (_FLOAT16 if to == "original" else None),
        form=form or ("bin" if to == "original" else "safetensors"),
        shard_size=shard_size,
        finish=finish,
        progress=progress,
    )


def _entries(folder: Path, vision_tower: str | Path | None, parts: Parts) -> dict[str, TensorEntry | Tensor]:
    """Where each tensor of the model lies, by our names in the modules' order."""
    found: dict[str, TensorEntry | Tensor] = {}
    rename = _rename_of(read_model_config(folder))
    found.update({new: entry for name, entry in read_tensor_table(folder).items() if (new := rename(name)) is not None})
    if vision_tower is not None:
        tower = resolve_folder(str(vision_tower), "vision_tower")
        found.update(
            {new: entry for name, entry in read_tensor_table(tower).items() if (new := tensor_names.from_clip(name))}
        )
    for name in (tensor_names.PROJECTOR_WEIGHT, tensor_names.PROJECTOR_BIAS):
        found.setdefault(name, parts.tensors[name].contiguous())
    return {name: found[name] for name in expected_shapes(parts.config)}


def _rename_of(config: Mapping[str, Any]) -> Any:
    if config.get("model_type") == MODEL_TYPE:
        return str
    stock = config.get("model_type") == RELEASED_MODEL_TYPE and "text_config" in config
    return tensor_names.from_stock if stock else tensor_names.from_released


def _finish_ours(parts: Parts, dtype: str | None, staged: Path) -> None:
    parts.config.save_pretrained(staged)
    processor_of(parts).save_pretrained(staged)
    if dtype is not None:
        config = json.loads((staged / "config.json").read_text(encoding="utf-8"))
        write_json(staged / "config.json", {**config, "dtype": dtype})


def _finish_original(parts: Parts, folder: Path, tokenizers: tuple[Path, ...], staged: Path) -> None:
    config = read_model_config(folder)
    if config.get("model_type") == MODEL_TYPE or "text_config" in config:
        described = {**parts.config.to_dict(), "model_type": MODEL_TYPE}
        config = flatten_config(described)
    # The model's own tokenizer first, so that what only the other folder has is added to it.
    copy_companions(ReleasedView(folder, dict(config), {}), staged, tuple(reversed(tokenizers)))
    if not (staged / "tokenizer.model").is_file():
        logger.warning(
            "%s: no tokenizer.model, which the original's code needs (say where LLaMA's is: --tokenizer)", folder
        )


def _text(path: str | Path | None) -> str | None:
    return None if path is None else str(path)
