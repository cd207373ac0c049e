"""Checkpoints whose language model is stored in 4 bits: which layers, how they are written, and how they are opened."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llavar_peft.atomic_files import write_json, write_text
from llavar_peft.constants import MODEL_TYPE
from llavar_peft.errors import ConfigError
from llavar_peft.models.model_parts import ModelParts
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.recipe.schema import ModelConfig, Projector, Recipe
from llavar_peft.recipe.validate import validate_recipe
from llavar_peft.types import Quantization, expand_home
from llavar_peft.weights.delta.released_layout import read_model_config, view_as_released
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.folder_writer import WeightsReport
from llavar_peft.weights.io.hub_folders import cached_folder, is_hub_name, resolve_folder
from llavar_peft.weights.io.quantized_weights import (
    QUANTIZATION,
    STATE,
    UNQUANTIZED,
    UNQUANTIZED_TOWER,
    check_packed,
    packed_specs,
    quantized_dtype,
    stored_quantization,
    write_quantized,
)
from llavar_peft.weights.io.tensor_blocks import check_tensors
from llavar_peft.weights.io.tensor_table import TensorEntry, dtype_name
from llavar_peft.weights.io.weights_fingerprint import FINGERPRINT_FILE, read_fingerprint, take_fingerprint
from llavar_peft.weights.io.write_weights import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from llavar_peft.models.llavar_config import LlavarConfig

NOT_QUANTIZED = (
    "model.vision_tower", "model.multi_modal_projector", "model.cross_attention", "model.detail_encoder", "lm_head",
)  # fmt: skip
"""Modules that are never quantized. "vision_tower" alone would not match the tower's modules."""
_LONGEST_STATE = 4096  # bytes


def packed_shapes(config: LlavarConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the matrices that are quantized, by name: those of the language model's linear layers."""
    with torch.device("meta"):
        skeleton = LlavarForConditionalGeneration(config)
    return {
        f"{name}.weight": tuple(module.weight.shape)
        for name, module in skeleton.named_modules()
        if type(module) is nn.Linear and not name.startswith(NOT_QUANTIZED)
    }


def check_stored(parts: ModelParts, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check names, shapes and descriptions of a quantized checkpoint's tensors.

    Args:
        parts: The checkpoint.
        shapes: What the configuration requires before the quantization.

    Raises:
        WeightsError: Names every tensor that is missing, unexpected, misshapen or described as another one.
    """
    packed = packed_shapes(parts.config)
    expected = {name: shape for name, shape in shapes.items() if name not in packed}
    for name, shape in packed.items():
        expected.update({spec.name: spec.shape for spec in packed_specs(name, shape)})
        state = parts.tensors.get(name + STATE)
        if state is not None and len(state.shape) == 1 and state.shape[0] <= _LONGEST_STATE:
            expected[name + STATE] = tuple(state.shape)  # as long as its text
    check_tensors(parts.tensors, expected, where=parts.source)
    check_packed(parts.tensors, packed, parts.source)


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let quantized layers return the dtype that the model computes in, whichever their weights had before."""
    for module in model.modules():
        state: Any = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            state.dtype = dtype


def prepare_stored(tensors: Mapping[str, Tensor], dtype: torch.dtype, storage: torch.dtype) -> dict[str, Tensor]:
    """Return a quantized model's tensors as ``from_pretrained`` is to take them over, which it does unchanged.

    Args:
        tensors: By name.
        dtype: Of everything that is not quantized.
        storage: Of the packed bytes. FSDP2 shards numbers of the dtype of the computation only.
    """
    packed = {name.removesuffix(STATE) for name in tensors if name.endswith(STATE)}
    prepared: dict[str, Tensor] = {}
    for name, one in tensors.items():
        owner, found, _ = name.partition(".weight.")
        if name in packed:
            prepared[name] = one if storage == one.dtype else one.reshape(-1).view(storage).view(-1, 1)
        elif (found and f"{owner}.weight" in packed) or not one.is_floating_point():
            prepared[name] = one
        else:
            prepared[name] = one.to(dtype)
    return prepared


def with_stored_quantization(config: ModelConfig, *, download: bool = True) -> ModelConfig:
    """Return a model's settings with ``quantize`` set if its checkpoint is stored in 4 bits.

    Args:
        config: The settings.
        download: Whether a checkpoint is downloaded that is neither on this disk nor in the hub's cache.

    Raises:
        ConfigError: ``quantize`` is another format than that of the checkpoint.
    """
    if config.checkpoint is None:
        return config
    folder: Path | None = expand_home(config.checkpoint)
    if folder is not None and not folder.is_dir() and is_hub_name(config.checkpoint):
        folder = cached_folder(config.checkpoint)
        if folder is None and download:
            folder = resolve_folder(config.checkpoint, "model.checkpoint")
    if folder is None or not (folder / "config.json").is_file():
        return config  # the loading reports what is wrong
    config_json = read_model_config(folder)
    if config_json.get("model_type") != MODEL_TYPE:
        return config
    stored = stored_quantization(config_json, folder)
    check_same_quantization(stored, config.quantize, folder)
    return config if stored is None else dataclasses.replace(config, quantize=stored)


def dtype_before(config: ModelConfig) -> str | None:
    """Return the dtype that a model's weights had before they were stored in 4 bits; None if they are not."""
    if config.checkpoint is None:
        return None
    config_json = read_model_config(resolve_folder(config.checkpoint, "model.checkpoint"))
    return quantized_dtype(config_json) if QUANTIZATION in config_json else None


def check_same_quantization(stored: Quantization | None, chosen: Quantization | None, folder: str | Path) -> None:
    """Reject another quantization than the one that a checkpoint is stored in."""
    if stored is not None and chosen not in (None, stored):
        raise ConfigError.at(
            "model.quantize",
            f"{folder} is stored in {stored}, and can be opened in no other format (got {chosen!r})",
            f"leave quantize out, or give the unquantized model with quantize {chosen}",
        )


def prepare_recipe(recipe: Recipe, *, download: bool = True) -> Recipe:
    """Validate a recipe, with ``model.quantize`` set if its checkpoint is stored in 4 bits.

    Args:
        recipe: The recipe.
        download: As for ``with_stored_quantization``.

    Raises:
        ConfigError: The recipe is not valid, or a stage needs the unquantized numbers.
    """
    recipe = validate_recipe(recipe)
    stored = with_stored_quantization(dataclasses.replace(recipe.model, quantize=None), download=download)
    if stored.quantize is None:
        return recipe
    check_same_quantization(stored.quantize, recipe.model.quantize, str(stored.checkpoint))
    for number, stage in enumerate(recipe.stages):
        if isinstance(stage.tune, Projector):
            raise ConfigError.at(
                f"stages.{number}.tune",
                f"a projector stage writes a whole model, and {stored.checkpoint} is stored in {stored.quantize}",
                "give the unquantized model with quantize: nf4, or use tune: lora",
            )
    return validate_recipe(dataclasses.replace(recipe, model=stored))


def stored_fingerprint(folder: Path, role: str) -> dict[str, Any] | None:
    """Return the fingerprint of what a quantized folder was made from; None for a folder that is not quantized.

    Args:
        folder: A model's folder.
        role: ``UNQUANTIZED`` or ``UNQUANTIZED_TOWER``.

    Raises:
        ConfigError: The folder is quantized and has no such fingerprint.
        WeightsError: The file of fingerprints is damaged.
    """
    if read_model_config(folder).get(QUANTIZATION) is None:
        return None
    known: dict[str, Any] | None = (read_fingerprint(folder / FINGERPRINT_FILE) or {}).get(role)
    if known is None:
        raise ConfigError.at(
            str(folder / FINGERPRINT_FILE),
            "does not say which weights this quantized model was made from",
            "convert the unquantized model again, with `llavar-peft convert --to llavar --quantize nf4`",
        )
    return known


def quantize_checkpoint(  # noqa: PLR0913 - what the conversion has read
    parts: ModelParts,
    source: Path,
    tensors: Mapping[str, TensorEntry | Tensor],
    out: Path,
    *,
    settings: Mapping[str, Any],
    dtype: str | None,
    shard_size: int,
    finish: Callable[[Path], None],
    progress: Progress | None,
) -> WeightsReport:
    """Write a model in this package's layout, with the language model's linear layers in 4 bits.

    Args:
        parts: The model.
        source: Its folder.
        tensors: Where its tensors are stored, under this package's names.
        out: Folder to create.
        settings: transformers' settings of the quantization, without the dtype.
        dtype: Of the result, by torch's name; None keeps each tensor's own, and quantizes in that of the embeddings.
        shard_size: Maximum size of a file in bytes.
        finish: Writes the other files.
        progress: Called after each tensor.

    Raises:
        ConfigError: The language model has matrices that would not be quantized.
        WeightsError: A tensor is damaged or not finite.
    """
    from llavar_peft.models.decoder_structure import check_linear

    check_linear(parts.config.text_config, "nf4")
    packed = packed_shapes(parts.config)
    chosen = dtype or dtype_name(tensors[next(iter(packed))])
    view = view_as_released(source)
    tower = {name: one for name, one in tensors.items() if name.startswith(tensor_names.TOWER)}
    prints = {UNQUANTIZED: take_fingerprint(view.table, view.config), UNQUANTIZED_TOWER: take_fingerprint(tower, {})}

    def complete(staged: Path) -> None:
        finish(staged)
        config = json.loads((staged / "config.json").read_text(encoding="utf-8"))
        quantization = {**settings, "bnb_4bit_compute_dtype": chosen}
        write_json(staged / "config.json", {**config, QUANTIZATION: quantization})
        write_text(staged / FINGERPRINT_FILE, json.dumps(prints) + "\n")

    return write_quantized(
        tensors,
        out,
        packed=packed,
        packed_dtype=chosen,
        dtype=dtype,
        shard_size=shard_size,
        finish=complete,
        progress=progress,
    )
