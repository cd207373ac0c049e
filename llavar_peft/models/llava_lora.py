"""Convert the LoRA folders of LLaVA's own code into adapters of this package.

Such a folder has peft's files with names of LLaVA's modules, ``non_lora_trainables.bin`` with the projector, and the
flat ``config.json`` of the whole model. It says nothing about its base but a name. The adapter has the same numbers
under our names, and is complete: settings of the base, processor and fingerprint.

Source: LLaVA, llava/train/train.py (what is saved) and llava/model/builder.py (how it is merged).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llavar_peft.atomic_files import write_json
from llavar_peft.constants import MODEL_TYPE
from llavar_peft.errors import ConfigError, Fault, LlavarError
from llavar_peft.models.adapter_loading import fingerprint_base
from llavar_peft.models.build_model import expected_shapes, register
from llavar_peft.models.checkpoint_loading import read_checkpoint, read_parts
from llavar_peft.models.flat_layout import LLAMA_TOKENS, check_features, is_flat, read_flat_resolution
from llavar_peft.models.llavar_config import flat_language_kind
from llavar_peft.models.model_parts import ModelParts
from llavar_peft.models.model_resolution import set_resolution
from llavar_peft.models.tower_loading import prepared_side
from llavar_peft.recipe.schema import ModelConfig, ProjectorType
from llavar_peft.types import expand_home
from llavar_peft.weights.adapter.adapter_files import ADAPTER_WEIGHTS, BASE_FILE, PREFIX
from llavar_peft.weights.adapter.adapter_layouts import AdapterOnDisk, is_llava_lora, open_adapter
from llavar_peft.weights.adapter.adapter_parts import AdapterPart, find_base_faults, find_shape_faults, split_adapter
from llavar_peft.weights.adapter.adapter_settings import peft_settings
from llavar_peft.weights.delta.released_layout import is_language_model, read_model_config
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.convert_layout import write_converted
from llavar_peft.weights.io.folder_writer import WeightsReport, check_outside
from llavar_peft.weights.io.hub_folders import resolve_folder
from llavar_peft.weights.io.joined_rows import whole
from llavar_peft.weights.io.shard_layout import RELEASED_SHARD_SIZE
from llavar_peft.weights.io.tensor_blocks import join_first, raise_faults
from llavar_peft.weights.io.tensor_table import SAFE_SINGLE, TensorEntry
from llavar_peft.weights.io.weights_card import portable_name, write_weights_card
from llavar_peft.weights.io.weights_fingerprint import FINGERPRINT_FILE
from llavar_peft.weights.io.write_weights import Progress

if TYPE_CHECKING:
    from torch import Tensor

_FIX_MERGE = "merge it with LLaVA's scripts/merge_lora_weights.py, and use the result as a checkpoint"
_PROJECTOR_MODULE = tensor_names.PROJECTOR.removesuffix(".")


def convert_llava_lora(
    source: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    progress: Progress | None = None,
) -> WeightsReport:
    """Write a LoRA of LLaVA's code as an adapter of this package. No model is built.

    Args:
        source: Its folder, or its name on the hub.
        out: Folder to create; must not exist.
        base: The language model that it was trained on, or a LLaVA; None is the one that the folder names.
        vision_tower: The tower of a base without one; None is the one that the folder names.
        progress: Called after each tensor with the number of bytes written and in total.

    Returns:
        What was written.

    Raises:
        ConfigError: The folder is no LoRA of LLaVA's code, or has settings that this package does not support.
        WeightsError: A tensor is missing, damaged or not finite, or does not fit the base.
        EnvironmentFaultError: The base or the tower is not on this disk, and cannot be downloaded.
    """
    register()
    folder = resolve_folder(str(source), "source")
    if not is_llava_lora(folder):
        raise ConfigError.at(
            str(folder),
            "not a LoRA of LLaVA's code (expected adapter_config.json, non_lora_trainables.bin and a config.json)",
            "give the whole folder that LLaVA's train_mem.py wrote; adapters of this package need no conversion",
        )
    check_outside(expand_home(out), folder)
    config_json = read_model_config(folder)
    if not is_flat(config_json):
        raise ConfigError.at(
            f"{folder / 'config.json'}:model_type",
            f"not the configuration of a LLaVA (got {ascii(config_json.get('model_type'))[:80]})",
            "copy the config.json that LLaVA saved next to the adapter into the folder",
        )
    check_features(folder, config_json)
    stored = open_adapter(folder)
    parts = split_adapter(stored.table)
    _check_trained(parts, folder)
    config = _find_base(stored, config_json, base, vision_tower)
    has_projector = any(part.module.startswith(_PROJECTOR_MODULE) for part in parts)
    if config.language_model is not None and not has_projector:
        raise ConfigError.at(
            str(folder),
            f"it has no projector, and neither has its base, the language model {config.language_model}",
            "give the LLaVA that it was trained on with --base",
        )
    model = read_checkpoint(config) if config.checkpoint is not None else read_parts(config, seed=0)
    config, model = _with_tiles(config, model, config_json, stored)
    raise_faults(list(_find_faults(stored, parts, expected_shapes(model.config))))

    def finish(staged: Path) -> None:
        (staged / SAFE_SINGLE).rename(staged / ADAPTER_WEIGHTS)
        settings = peft_settings(stored.settings, stored.adapted)
        settings.base_model_name_or_path = config.checkpoint or config.language_model
        settings.inference_mode = True
        settings.save_pretrained(str(staged))
        model.config.save_pretrained(staged)
        model.processor().save_pretrained(staged)
        write_json(staged / BASE_FILE, dataclasses.asdict(config))
        write_json(staged / FINGERPRINT_FILE, {"base": fingerprint_base(config)})
        title = f"The adapter {portable_name(source)}, converted from LLaVA's layout"
        write_weights_card(staged, title, {"base": config.checkpoint or config.language_model or ""}, adapters=[folder])

    table = _with_newline(stored, model, has_projector=has_projector)
    return write_converted(
        table,
        expand_home(out),
        dtype=None,
        form="safetensors",
        shard_size=max(RELEASED_SHARD_SIZE, 2 * sum(tensor.nbytes for tensor in table.values())),
        finish=finish,
        progress=progress,
    )


def _with_tiles(
    config: ModelConfig, model: ModelParts, config_json: Mapping[str, Any], stored: AdapterOnDisk
) -> tuple[ModelConfig, ModelParts]:
    """Return the settings and the parts of a base with the tiles that a LoRA was trained with.

    Raises:
        ConfigError: The base reads tiles and the LoRA was trained without, or neither has the newline embedding.
    """
    tiles = read_flat_resolution(config_json, prepared_side(model.image_processor, model.source), stored.folder)
    base = model.config.resolution
    if tiles is None and base is not None:
        raise ConfigError.at(
            f"{stored.folder / 'config.json'}:image_aspect_ratio",
            f"it was trained on the whole image only, and its base {model.source} has the resolution {base['type']}",
            "give the model that it was trained on with --base",
        )
    if tiles is None:
        return config, model
    if base is None and tensor_names.NEWLINE not in {name.removeprefix(PREFIX) for name in stored.table}:
        raise ConfigError.at(
            str(stored.folder),
            f"it was trained with tiles, and has no {tensor_names.RELEASED_NEWLINE}; neither has its base "
            f"{model.source}",
            "give the LLaVA 1.6 that it was trained on with --base",
        )
    config = dataclasses.replace(config, resolution=tiles)
    return config, set_resolution(model, tiles, seed=0)


def _with_newline(stored: AdapterOnDisk, model: ModelParts, *, has_projector: bool) -> dict[str, TensorEntry | Tensor]:
    """Return a LoRA's tensors with its base's newline, which LLaVA leaves untrained where the base has one.

    Args:
        stored: The LoRA.
        model: Its base.
        has_projector: Whether the LoRA has a projector, of which the newline is a part in this package.
    """
    table: dict[str, TensorEntry | Tensor] = dict(stored.table)
    newline = model.tensors.get(tensor_names.NEWLINE)
    if has_projector and newline is not None:
        table.setdefault(PREFIX + tensor_names.NEWLINE, whole(newline).contiguous())
    return table


def _check_trained(parts: tuple[AdapterPart, ...], folder: Path) -> None:
    """Reject what LLaVA trained besides low-rank updates and the projector: rows of the embeddings, or the tower."""
    others = [
        f"{part.module}.{name}"
        for part in parts
        if part.in_full and not part.module.startswith(_PROJECTOR_MODULE)
        for name in part.tensors
    ]
    if others:
        raise ConfigError.at(
            str(folder), f"tensors besides the projector were trained in full: {join_first(others, 3)}", _FIX_MERGE
        )


def _find_base(
    stored: AdapterOnDisk, config_json: Mapping[str, Any], base: str | Path | None, vision_tower: str | Path | None
) -> ModelConfig:
    """Return the settings of the model that a LoRA was trained on."""
    base_name = str(base or stored.settings.get("base_model_name_or_path") or "")
    tower_name = str(vision_tower or config_json.get("mm_vision_tower") or "")
    if not base_name:
        raise ConfigError.at(
            str(stored.folder),
            "it does not name its base",
            "give the language model that it was trained on with --base",
        )
    base_config = read_model_config(_resolve(base_name, "base", given=base is not None))
    if base_config.get("model_type") == MODEL_TYPE or "text_config" in base_config:
        return ModelConfig(checkpoint=_absolute(base_name))
    _resolve(tower_name, "vision-tower", given=vision_tower is not None)
    if not is_language_model(base_config):
        return ModelConfig(checkpoint=_absolute(base_name), vision_tower=_absolute(tower_name))
    if config_json.get("mm_use_im_start_end") or config_json.get("mm_use_im_patch_token", True):
        raise ConfigError.at(
            str(stored.folder),
            f"it was trained with image tokens, whose rows its base {base_name} does not have",
            "give the LLaVA that it was trained on with --base",
        )
    return ModelConfig(
        language_model=_absolute(base_name),
        vision_tower=_absolute(tower_name),
        projector_type=cast("ProjectorType", config_json.get("mm_projector_type") or "linear"),
        template="vicuna_v1" if flat_language_kind(config_json) in LLAMA_TOKENS else "chat",
        vision_feature_layer=int(config_json.get("mm_vision_select_layer") or -2),
        image_mode="square" if config_json.get("image_aspect_ratio") == "square" else "pad",
    )


def _resolve(name: str, option: str, *, given: bool) -> Path:
    """Return the folder of a base or a tower; where it is only named in the LoRA's files, say how to give another."""
    try:
        return resolve_folder(name, f"--{option}")
    except LlavarError as error:
        if given:
            raise
        fault = error.faults[0]
        what = f"the LoRA's files name a folder that cannot be used: {fault.what}"
        raise type(error).at(f"--{option}", what, f"give the folder with --{option}") from error


def _absolute(name: str) -> str:
    """Return the absolute path of a folder; a name of the hub unchanged."""
    path = expand_home(name)
    return str(path.resolve()) if path.is_dir() else name


def _find_faults(
    stored: AdapterOnDisk, parts: tuple[AdapterPart, ...], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[Fault]:
    where = str(stored.folder)
    shape_faults = list(find_shape_faults(parts, stored.settings, where))
    yield from shape_faults or find_base_faults(parts, stored.settings, shapes, where)
