"""A second encoder for the cross-attention, other than the model's own tower: Pix2Struct, or another vision tower.

Shape suffixes: N images, P patches of an image, C width of the encoder, L numbers of a flattened patch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPImageProcessorPil,
    Pix2StructImageProcessorPil,
    Pix2StructVisionConfig,
    Pix2StructVisionModel,
)

from llavar_peft.errors import ConfigError
from llavar_peft.models.pretrained_files import check_sizes, load_pretrained, make_part_settings, unreadable_settings
from llavar_peft.models.tower_loading import read_tower
from llavar_peft.models.vision_tower import LlavarVisionTower, tower_features
from llavar_peft.types import expand_home
from llavar_peft.weights.delta.released_layout import read_model_config
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.hub_folders import cached_folder
from llavar_peft.weights.io.tensor_blocks import open_weights

if TYPE_CHECKING:
    from llavar_peft.models.llavar_config import LlavarConfig

PIX2STRUCT = ("pix2struct", "pix2struct_vision_model")
PIX2STRUCT_PATCHES = 2048
"""Maximum number of patches of Pix2Struct's image processor, which the paper uses."""
IMAGES_AT_ONCE = 8
"""Number of images that the encoder computes at once."""


@dataclass(frozen=True, slots=True)
class EncoderParts:
    """An encoder on disk.

    Attributes:
        config: Its configuration, as our ``config.json`` has it.
        tensors: Its tensors by our names.
        image_settings: Those of its image processor, as our ``processor_config.json`` has them.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    image_settings: dict[str, Any]


def read_encoder(folder: Path) -> EncoderParts:
    """Read the encoder of a Pix2Struct, or a vision tower.

    Raises:
        ConfigError: The folder holds neither of them.
        WeightsError: A file cannot be read.
    """
    if read_model_config(folder).get("model_type") not in PIX2STRUCT:
        tower = read_tower(folder)
        ours = tensor_names.DETAIL_ENCODER
        tensors = {ours + name.removeprefix(tensor_names.TOWER): one for name, one in tower.tensors.items()}
        return EncoderParts(tower.config.to_dict(), tensors, tower.image_processor.to_dict())
    config = load_pretrained(Pix2StructVisionConfig, folder)
    images: Any = load_pretrained(Pix2StructImageProcessorPil, folder)
    stored = dict(open_weights(folder))
    # Of a complete model, the encoder is a part.
    prefix = "encoder." if any(name.startswith("decoder.") for name in stored) else ""
    tensors = {
        tensor_names.DETAIL_ENCODER + name.removeprefix(prefix): one
        for name, one in stored.items()
        if name.startswith(prefix)
    }
    return EncoderParts(config.to_dict(), tensors, images.to_dict())


def read_encoder_config(name: str, setting: str) -> dict[str, Any]:
    """Return the configuration of an encoder, as our ``config.json`` has it, without weights and the network.

    Args:
        name: Its folder, or its hub name if that is in the hub's cache.
        setting: The setting that names it, for the message.

    Raises:
        ConfigError: It is not on this disk, or no encoder.
    """
    folder = cached_folder(name) or expand_home(name)
    if not (folder / "config.json").is_file():
        what = f"no config.json of this encoder on this disk (got {name!r})"
        raise ConfigError.at(setting, what, f"give its folder, or `hf download {name} config.json`")
    config_json = read_model_config(folder)
    fields = config_json.get("vision_config") or config_json
    encoder_config: dict[str, Any] = make_part_settings(fields, folder, default="pix2struct_vision_model").to_dict()
    return encoder_config


def make_encoder(config: LlavarConfig) -> nn.Module | None:
    """Return the untrained encoder of a model; None for a model without one of its own."""
    settings = config.detail_config
    if settings is None or config.cross_attention is None:
        return None
    encoder_config = AutoConfig.for_model(**{**settings, "model_type": settings.get("model_type")})
    check_sizes(encoder_config, Path(config.name_or_path or "config.json"))
    if encoder_config.model_type in PIX2STRUCT:
        pix2struct: nn.Module = Pix2StructVisionModel(encoder_config)
        return pix2struct
    tower: nn.Module = (
        LlavarVisionTower(encoder_config)
        if encoder_config.model_type == "clip_vision_model"
        else AutoModel.from_config(encoder_config, trust_remote_code=False)
    )
    return tower


def encoder_features(encoder: Any, values: Tensor) -> list[Tensor]:
    """Return the features of images ``[P, C]``: the last hidden state of Pix2Struct, the last but one of a tower.

    Args:
        encoder: From ``make_encoder``.
        values: Prepared images ``[N, 3, S, S]``, or Pix2Struct's flattened patches ``[N, P, L]``, padded with zeros.
    """
    features: list[Tensor] = []
    for part in torch.split(values.to(encoder.dtype), IMAGES_AT_ONCE):
        if isinstance(encoder, Pix2StructVisionModel):
            is_patch_NP = part[:, :, 0] != 0
            hidden_NPC = encoder(part, attention_mask=is_patch_NP.to(part.dtype)).last_hidden_state
            counts = is_patch_NP.sum(dim=1).tolist()
            features += [one_PC[:count] for one_PC, count in zip(hidden_NPC, counts, strict=True)]
        else:
            patches = (part.shape[-1] // encoder.config.patch_size) ** 2
            features += tower_features(encoder, part, encoder.config.num_hidden_layers - 1)[:, -patches:]
    return features


def empty_values(encoder: Any, like: Tensor) -> Tensor:
    """Return the input of the smallest image.

    Args:
        encoder: From ``make_encoder``.
        like: A tensor of the dtype and on the device of the result.
    """
    if isinstance(encoder, Pix2StructVisionModel):
        return like.new_ones(1, 1, 2 + encoder.config.patch_embed_hidden_size)
    side = encoder.config.image_size
    return like.new_zeros(1, 3, side, side)


@lru_cache(maxsize=8)
def _image_processor(settings_json: str) -> Any:
    settings = json.loads(settings_json)
    kind = str(settings.pop("image_processor_type", ""))
    return (Pix2StructImageProcessorPil if kind.startswith("Pix2Struct") else CLIPImageProcessorPil)(**settings)


def image_processor_of(settings: dict[str, Any]) -> Any:
    """Return the image processor of an encoder, from the settings in ``processor_config.json``.

    Raises:
        ConfigError: The settings are damaged.
    """
    try:
        return _image_processor(json.dumps(settings, sort_keys=True))
    except Exception as error:  # transformers passes on whatever the settings cause
        raise unreadable_settings(Path("processor_config.json"), "detail_settings", error) from error
