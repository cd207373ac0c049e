"""``export``: convert a LLaVAR between layouts, from disk to disk.

``llavar``    this package's layout, for ``build_model``, ``Trainer`` and ``ask``
``original``  the layout of the released weights, for the original's code; contains no vision tower
``hf-llava``  stock ``transformers.LlavaForConditionalGeneration`` with processor and chat template, which ``pipeline``
              and vLLM run without this package
``adapter``   an adapter of this package, from a LoRA of LLaVA's own code
``gguf``      files for llama.cpp, LM Studio and Ollama
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llavar_peft.atomic_files import write_json
from llavar_peft.constants import MODEL_TYPE, STOCK_MODEL_TYPES
from llavar_peft.errors import ConfigError
from llavar_peft.models.build_model import expected_shapes, quantization_arguments, register
from llavar_peft.models.checkpoint_loading import read_checkpoint
from llavar_peft.models.engine_support import check_vllm
from llavar_peft.models.export_options import Layout, check_options
from llavar_peft.models.flat_layout import is_flat
from llavar_peft.models.gguf_language_model import language_model_file
from llavar_peft.models.gguf_projector import projector_file
from llavar_peft.models.hf_llava import write_stock_companions
from llavar_peft.models.llava_lora import convert_llava_lora
from llavar_peft.models.llavar_config import count_needed_layers
from llavar_peft.models.model_parts import ModelParts, check_vocabulary
from llavar_peft.models.quantized_checkpoint import quantize_checkpoint
from llavar_peft.recipe.schema import ModelConfig
from llavar_peft.types import Quantization, expand_home
from llavar_peft.weights.adapter.adapter_files import ADAPTER_CONFIG
from llavar_peft.weights.adapter.adapter_layouts import conversion_of, is_llava_lora
from llavar_peft.weights.delta.flat_settings import flatten_config
from llavar_peft.weights.delta.released_layout import (
    ReleasedView,
    check_original_tower,
    copy_companions,
    find_tokenizer,
    read_model_config,
)
from llavar_peft.weights.gguf.gguf_folder import write_gguf_folder
from llavar_peft.weights.gguf.gguf_tensors import OutType
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.convert_layout import ACTIVATIONS, ProjectorForm, to_two_layers, write_converted
from llavar_peft.weights.io.folder_writer import WeightsReport, check_is_new, check_outside
from llavar_peft.weights.io.hub_folders import find_folder, resolve_folder
from llavar_peft.weights.io.joined_rows import whole
from llavar_peft.weights.io.quantized_weights import check_unquantized
from llavar_peft.weights.io.shard_layout import RELEASED_SHARD_SIZE, WeightsFormat
from llavar_peft.weights.io.tensor_blocks import check_tensors
from llavar_peft.weights.io.tensor_table import TensorEntry, check_dtype, read_tensor_table, torch_dtype
from llavar_peft.weights.io.weights_card import portable_name, write_weights_card
from llavar_peft.weights.io.write_weights import Progress

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_FLOAT16 = "float16"
_STOCK_PAD = "<pad>"
"""The token that ``llava-hf/llava-1.5-*`` adds next to the image token."""


def export(  # noqa: PLR0913 - the options of the conversion
    source: str | Path,
    out: str | Path,
    *,
    to: Layout,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    tokenizer: str | Path | None = None,
    projector: ProjectorForm = "linear",
    quantize: Quantization | None = None,
    dtype: str | None = None,
    form: WeightsFormat | None = None,
    outtype: OutType | None = None,
    shard_size: int = RELEASED_SHARD_SIZE,
    progress: Progress | None = None,
) -> WeightsReport:
    """Write a LLaVAR in another layout.

    No model is built. After an interruption or a full disk, the same call resumes (``gguf`` starts again). Stock LLaVA
    prepares images as LLaVAR is trained (``pad``); it does not support ``run_llava``'s ``pad_black``.

    Args:
        source: Folder (or hub name) of a LLaVAR in any of the three layouts.
        out: Folder to create; must not exist.
        to: Layout of the result; ``adapter`` is for a LoRA of LLaVA's own code.
        base: For ``adapter``: the model that it was trained on; None is the one that its files name.
        vision_tower: CLIP's folder, for a source in the released layout, which contains no tower.
        tokenizer: Folder with LLaMA's ``tokenizer.model``, which the original's code needs; for ``original`` from a
            source that has none.
        projector: How ``hf-llava`` represents the linear layer: ``"linear"``, or ``"two-sided"``, with which vLLM's own
            LLaVA runs it without further options.
        quantize: ``"nf4"`` stores the language model's linear layers in 4 bits, in the layout ``llavar``.
        dtype: Of the result, by torch's name; None keeps each tensor's own (``original``: float16, as released).
        form: ``"safetensors"`` or ``"bin"``; None is ``"bin"`` for ``original`` and ``"safetensors"`` otherwise.
        outtype: How ``gguf`` stores matrices: ``"f16"`` (None), ``"q8_0"`` or ``"bf16"``.
        shard_size: Maximum number of bytes per file.
        progress: Called after each tensor with the number of bytes written and in total.

    Returns:
        What was written.

    Raises:
        ConfigError: The source is not a LLaVAR, its tower is not given, or ``out`` exists.
        WeightsError: A tensor is missing, damaged, not finite or has the wrong shape, or a stock LLaVA's projector is
            not linear.
        InterruptedRunError: Ctrl-C.
        EnvironmentFaultError: The disk is full, or another process writes the same folder.
        MissingDependencyError: ``gguf``, and the package of that name is not installed.
    """
    register()
    check_options(
        to, base=base, tokenizer=tokenizer, projector=projector, quantize=quantize, dtype=dtype, form=form,
        outtype=outtype,
    )  # fmt: skip
    check_dtype(dtype)
    if to == "adapter":
        return convert_llava_lora(source, out, base=base, vision_tower=vision_tower, progress=progress)
    folder = _open_source(source)
    check_is_new(expand_home(out))
    check_outside(expand_home(out), folder)
    tower = None if vision_tower is None else str(vision_tower)
    parts = read_checkpoint(ModelConfig(checkpoint=str(folder), vision_tower=tower))
    _check_has_layout(parts, to, projector, folder)
    check_tensors(parts.tensors, expected_shapes(parts.config), where=parts.source)
    check_vocabulary(parts)
    count_needed_layers(parts.config.vision_feature_layer, parts.config.vision_config.num_hidden_layers)
    read = parts.whole_tensors()
    rows = _rows_in_original(parts) if to == "original" else int(parts.config.text_config.vocab_size)
    tensors = _locate_tensors(folder, tower, parts, rows)
    if to == "gguf":
        return _write_gguf(parts, tensors, portable_name(source), expand_home(out), outtype or "f16", progress)
    if to == "original":
        tensors = {new: one for name, one in tensors.items() if (new := tensor_names.to_released(name)) is not None}
        folders = (find_folder(tokenizer, "tokenizer"), folder) if tokenizer is not None else (folder,)
        find_tokenizer(tuple(reversed(folders)))  # a link out of a folder is found before anything is written
        finish = partial(_finish_original, parts, rows, folder, folders)
    elif to == "hf-llava":
        activation = parts.config.projector_hidden_act
        if activation == "linear":
            layers = to_two_layers(read[tensor_names.PROJECTOR_WEIGHT], read[tensor_names.PROJECTOR_BIAS], projector)
            replaced = (tensor_names.PROJECTOR_WEIGHT, tensor_names.PROJECTOR_BIAS)
            kept = {name: one for name, one in tensors.items() if name not in replaced}
            tensors, activation = {**kept, **layers}, ACTIVATIONS[projector]
        tower_kind = parts.config.vision_config.model_type
        tensors = {tensor_names.to_stock(name, tower_kind): one for name, one in tensors.items()}
        finish = partial(write_stock_companions, parts, activation, dtype)
    else:
        finish = partial(_finish_own_layout, parts, dtype)

    def complete(staged: Path) -> None:
        finish(staged)
        sources = {"model": source, **({"vision tower": vision_tower} if vision_tower is not None else {})}
        in_bits = "" if quantize is None else ", in 4 bits"
        write_weights_card(staged, f"{portable_name(source)} in the layout {to}{in_bits}", sources)

    if quantize is not None:
        settings = quantization_arguments(quantize, torch.float32)["quantization_config"].to_dict()
        return quantize_checkpoint(
            parts, folder, tensors, expand_home(out), settings=settings, dtype=dtype, shard_size=shard_size,
            finish=complete, progress=progress,
        )  # fmt: skip
    return write_converted(
        tensors,
        expand_home(out),
        dtype=dtype or (_FLOAT16 if to == "original" else None),
        form=form or ("bin" if to == "original" else "safetensors"),
        shard_size=shard_size,
        finish=complete,
        progress=progress,
    )


def _open_source(source: str | Path) -> Path:
    """Return the folder of a model with its original numbers."""
    folder = resolve_folder(str(source), "source")
    if (folder / ADAPTER_CONFIG).is_file():
        fix = conversion_of(folder) if is_llava_lora(folder) else "merge it first with `llavar-peft merge`"
        raise ConfigError.at(str(folder), "an adapter, expected a complete model", fix)
    check_unquantized(read_model_config(folder), folder, "a conversion")
    return folder


def _write_gguf(
    parts: ModelParts,
    tensors: Mapping[str, TensorEntry | Tensor],
    source: str,
    out: Path,
    outtype: OutType,
    progress: Progress | None,
) -> WeightsReport:
    name = source.rpartition("/")[2] or "model"
    files = [make(parts, tensors, name, outtype) for make in (language_model_file, projector_file)]
    return write_gguf_folder(out, files, progress)


def _check_has_layout(parts: ModelParts, to: Layout, projector: ProjectorForm, folder: Path) -> None:
    """Reject a model that the code which reads a layout cannot compute."""
    if to in ("original", "hf-llava", "gguf") and parts.config.cross_attention is not None:
        raise ConfigError.at(
            "to",
            f"no engine that reads {to} has the cross-attention of this model (its resolution is cross_attention)",
            "serve it with `llavar-peft serve`; for other engines, train a model with resolution: {type: tiles}",
        )
    if to == "original":
        _check_original(parts)
        check_original_tower(parts.config.to_dict(), folder)
    if to == "hf-llava" and projector == "two-sided":
        check_vllm(parts)


def _check_original(parts: ModelParts) -> None:
    """Reject a model that LLaVA's code cannot read: with another language model, tower or resolution."""
    tiles = parts.config.tiles
    if tiles is not None and tiles.pool != 1:
        raise ConfigError.at(
            "to",
            "LLaVA's code reads tiles, but does not average their patches (pool: 2)",
            "use the layout llavar",
        )
    kinds = (parts.config.text_config.model_type, parts.config.vision_config.model_type)
    for what, kind, expected in (
        ("language models LLaMA and Mistral", kinds[0], ("llama", "mistral")),
        ("vision tower CLIP", kinds[1], ("clip_vision_model",)),
    ):
        if kind not in expected:
            raise ConfigError.at(
                "to",
                f"the original layout exists for the {what} only (got {kind!r})",
                "use hf-llava, which stock transformers opens",
            )


def _rows_in_original(parts: ModelParts) -> int:
    """Return the number of rows of the embeddings in the original layout, which has none for LLaVA-1.5's image token.

    Rows from the image token on are left out, unless one of them belongs to a token of the language model.
    """
    rows, first = int(parts.config.text_config.vocab_size), int(parts.config.image_token_index)
    later = {token for token, index in parts.tokenizer.get_vocab().items() if index >= first}
    return first if parts.template != "llava_v1" and later <= {parts.image_token, _STOCK_PAD} else rows


def _locate_tensors(folder: Path, tower: str | None, parts: ModelParts, rows: int) -> dict[str, TensorEntry | Tensor]:
    """Return where each tensor of the model is stored, under this package's names in the modules' order.

    Embeddings and head that have another number of rows on disk are in memory.
    """
    rename = _choose_rename(read_model_config(folder))
    found: dict[str, TensorEntry | Tensor] = {
        new: entry for name, entry in read_tensor_table(folder).items() if (new := rename(name)) is not None
    }
    for name in (tensor_names.find_embeddings(parts.tensors), tensor_names.HEAD):
        entry = found.get(name)
        if isinstance(entry, TensorEntry) and name in parts.tensors and entry.shape[0] != rows:
            found[name] = whole(parts.tensors[name])[:rows].to(torch_dtype(entry.dtype)).contiguous()
    if tower is not None and not parts.config.tuned_vision_tower:
        entries = read_tensor_table(resolve_folder(tower, "vision_tower"))
        found.update({new: entry for name, entry in entries.items() if (new := tensor_names.from_clip(name))})
    # A projector that was converted, and towers other than CLIP, whose names transformers changes.
    return {
        name: found[name] if name in found else whole(parts.tensors[name]).contiguous()
        for name in expected_shapes(parts.config)
    }


def _choose_rename(config: Mapping[str, Any]) -> Callable[[str], str | None]:
    if config.get("model_type") == MODEL_TYPE:
        return str
    stock = config.get("model_type") in STOCK_MODEL_TYPES and "text_config" in config
    return tensor_names.from_stock if stock else tensor_names.from_released


def _finish_own_layout(parts: ModelParts, dtype: str | None, staged: Path) -> None:
    parts.config.save_pretrained(staged)
    parts.processor().save_pretrained(staged)
    if dtype is not None:
        config = json.loads((staged / "config.json").read_text(encoding="utf-8"))
        write_json(staged / "config.json", {**config, "dtype": dtype})


def _finish_original(parts: ModelParts, rows: int, folder: Path, tokenizers: tuple[Path, ...], staged: Path) -> None:
    config = read_model_config(folder)
    if not is_flat(config):
        whole_config = {**parts.config.to_dict(), "model_type": MODEL_TYPE}
        config = {**flatten_config(whole_config, template=parts.template), "vocab_size": rows}
    # The model's own tokenizer comes first; only files that it lacks are copied from the other folder.
    copy_companions(ReleasedView(folder, dict(config), {}), staged, tuple(reversed(tokenizers)))
    if not (staged / "tokenizer.model").is_file():
        logger.warning(
            "%s has no tokenizer.model, which the original's code needs: give the folder of LLaMA's with --tokenizer",
            folder,
        )
