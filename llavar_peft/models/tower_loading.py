"""Read a vision tower from disk: configuration, tensors, and how its images are prepared."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
)
from transformers.utils import logging as hf_logging

from llavar_peft.errors import ConfigError, WeightsError
from llavar_peft.models.pretrained_files import check_sizes, load_pretrained, unreadable_settings, with_defaults
from llavar_peft.weights.delta.released_layout import read_model_config
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.tensor_blocks import open_weights

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

_CLIP = ("clip", "clip_vision_model")
_VARIABLE_RESOLUTION = {"siglip2", "siglip2_vision_model"}
_OF_EACH_STAGE = ("depths", "num_attention_heads", "hidden_sizes", "num_heads", "embed_dims")
"""Settings that are lists for towers with several resolutions, such as Swin."""
_REQUIRED = ("hidden_size", "num_hidden_layers", "image_size", "patch_size")
_SETTINGS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TowerParts:
    """A vision tower on disk.

    Attributes:
        config: Its configuration, without that of a text tower.
        tensors: Its tensors by our names.
        image_processor: Its image processor's settings as CLIP's Pillow-based one.
        side: Side of a prepared image, in pixels.
        extra_positions: Number of its positions that are no patches: the class token and register tokens.
    """

    config: PretrainedConfig
    tensors: dict[str, Tensor]
    image_processor: CLIPImageProcessorPil
    side: int
    extra_positions: int


def read_tower(folder: Path) -> TowerParts:
    """Read a vision tower.

    CLIP's tensors are mapped from disk; those of another tower are loaded by transformers, which knows the names of all
    its versions.

    Args:
        folder: Holds ``config.json``, weights and ``preprocessor_config.json``.

    Raises:
        ConfigError: The folder holds no tower whose features form a grid of patches, or no image processor.
        WeightsError: A tensor is missing, or a file cannot be read.
    """
    config_json = read_model_config(folder)
    _check_kind(config_json, folder)
    is_clip = config_json.get("model_type") in _CLIP
    config: PretrainedConfig = load_pretrained(CLIPVisionConfig, folder) if is_clip else _read_config(folder)
    # Transformers 4 writes the image processor to a file of its own, transformers 5 into that of the processor.
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ConfigError.at(
            str(folder),
            "no preprocessor_config.json and no processor_config.json in it",
            "copy the file from the vision tower's original folder",
        )
    if is_clip:
        stored = open_weights(folder).items()
        tensors = {ours: tensor for name, tensor in stored if (ours := tensor_names.from_clip(name))}
        images = load_pretrained(CLIPImageProcessorPil, folder)
    else:
        tensors = _load_tensors(folder, config)
        images = as_clip_processor(load_pretrained(AutoImageProcessor, folder))
    side = prepared_side(images, str(folder))
    return TowerParts(
        config=config,
        tensors=tensors,
        image_processor=images,
        side=side,
        extra_positions=count_extra_positions(config, side, folder),
    )


def _check_kind(config_json: Mapping[str, Any], folder: Path) -> None:
    """Reject a model that is no tower of one resolution, before its sizes are checked.

    Raises:
        ConfigError: Names what it is.
    """
    kind, where = config_json.get("model_type"), f"{folder / 'config.json'}:model_type"
    whole = with_defaults(config_json, folder)
    vision = whole.get("vision_config") or whole
    if not isinstance(vision, Mapping):
        what = f"not an object (got {ascii(vision)[:80]})"
        raise ConfigError.at(f"{folder / 'config.json'}:vision_config", what, "download the file again")
    kinds = {str(kind), str(vision.get("model_type", kind))}
    fix = "give the folder of a vision tower with a fixed resolution, such as a CLIP, SigLIP or DINOv2"
    if kinds & _VARIABLE_RESOLUTION:
        what = f"a tower whose resolution varies with the image (got {kind!r}, the NaFlex variant of SigLIP 2)"
        fix = "use a SigLIP 2 with a fixed resolution, such as google/siglip2-so400m-patch14-384"
        raise ConfigError.at(where, what, fix)
    if "vision_config" not in whole and CONFIG_MAPPING[str(kind)] in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = f"a language model, expected a vision tower (got {kind!r})"
        raise ConfigError.at(where, what, f"set language_model to it, and vision_tower: {fix}")
    layered = [name for name in _OF_EACH_STAGE if isinstance(vision.get(name), list | tuple)]
    if layered:
        what = f"a tower without one grid of patches: the resolution changes between its layers (got {kind!r}, with "
        raise ConfigError.at(where, f"{what}{layered[0]} {vision[layered[0]]})", fix)


def read_tower_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a tower other than CLIP by our names, in memory.

    Raises:
        ConfigError: The folder holds no tower.
        WeightsError: A tensor is missing, or a file cannot be read.
    """
    return _load_tensors(folder, _read_config(folder))


def count_extra_positions(config: PretrainedConfig, side: int, folder: Path) -> int:
    """Return how many positions of a tower are no patches, by a forward pass without memory.

    Raises:
        ConfigError: The tower cannot be built, or its features form no grid.
    """
    if isinstance(config, CLIPVisionConfig):
        return 1
    short = copy.deepcopy(config)
    short.num_hidden_layers = 1
    try:
        with torch.device("meta"):
            tower: Any = AutoModel.from_config(short, trust_remote_code=False)
            positions = tower(torch.zeros(1, 3, side, side)).last_hidden_state.shape[1]
    except Exception as error:  # transformers passes on whatever the settings cause
        raise unreadable_settings(folder, "vision tower", error) from error
    extra = int(positions) - (side // int(config.patch_size)) ** 2
    if extra < 0:
        raise ConfigError.at(
            f"{folder / 'config.json'}:model_type",
            f"the features form no grid of patches (got {positions} for an image of {side} pixels and patches of "
            f"{config.patch_size})",
            "use a tower such as CLIP, SigLIP or DINOv2",
        )
    return extra


def as_clip_processor(processor: Any) -> CLIPImageProcessorPil:
    """Return an image processor's settings as CLIP's Pillow-based one, whose pixels equal the original's."""
    stated = processor.to_dict()
    settings = {name: stated[name] for name in _SETTINGS if stated.get(name) is not None}
    for name in ("size", "crop_size"):
        if name in settings:
            settings[name] = {key: value for key, value in dict(settings[name]).items() if value is not None}
    return CLIPImageProcessorPil(**{"do_center_crop": False, **settings})


def prepared_side(processor: Any, where: str = "preprocessor_config.json") -> int:
    """Return the side in pixels of the square that an image processor makes of every image.

    Raises:
        ConfigError: It does not make squares of one size.
    """
    size = dict((processor.crop_size if processor.do_center_crop else processor.size) or {})
    height, width = size.get("height"), size.get("width")
    if not height or height != width:
        raise ConfigError.at(
            where,
            f"the image processor makes no squares of one size (got {size}, expected equal height and width)",
            "use the preprocessor_config.json of a tower with a fixed resolution",
        )
    return int(height)


def _read_config(folder: Path) -> PretrainedConfig:
    whole: Any = load_pretrained(AutoConfig, folder)
    config: PretrainedConfig = getattr(whole, "vision_config", whole)
    check_sizes(config, folder)
    missing = [name for name in _REQUIRED if not isinstance(getattr(config, name, None), int)]
    if missing:
        raise ConfigError.at(
            f"{folder / 'config.json'}:model_type",
            f"not a vision transformer with a grid of patches (got {config.model_type!r}, which has no "
            f"{', '.join(missing)})",
            "give the folder of a vision tower with a fixed resolution, such as a CLIP, SigLIP or DINOv2",
        )
    return config


def _load_tensors(folder: Path, config: PretrainedConfig) -> dict[str, Tensor]:
    level, has_bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        tower, loading = AutoModel.from_pretrained(
            str(folder), config=config, output_loading_info=True, dtype="auto", trust_remote_code=False
        )
    except Exception as error:  # transformers passes on whatever a damaged file causes
        raise unreadable_settings(folder, "vision tower", error) from error
    finally:
        hf_logging.set_verbosity(level)
        if has_bar:
            hf_logging.enable_progress_bar()
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise WeightsError.at(
            str(folder), f"{len(missing)} tensors are missing, such as {missing[0]}", "download the files again"
        )
    return {tensor_names.TOWER + name: tensor for name, tensor in tower.state_dict().items()}
