"""Give a model that was read from disk the resolution that its settings ask for.

This is done before the model is built: tiles and cross-attention have weights, which are drawn here if there are none.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch

from llavar_peft.data.tile_layout import TileGeometry
from llavar_peft.errors import ConfigError, WeightsError
from llavar_peft.models.cross_attention_hooks import check_decoder
from llavar_peft.models.detail_encoder import read_encoder
from llavar_peft.models.detail_features import draw_cross_attention
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.model_parts import ModelParts
from llavar_peft.models.tower_loading import prepared_side
from llavar_peft.recipe.resolution import (
    CONCAT_CLIP,
    CrossAttention,
    Tiles,
    checked_resolution,
    describe_resolution,
    resolution_from,
)
from llavar_peft.recipe.schema import ModelConfig
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.hub_folders import resolve_folder
from llavar_peft.weights.io.stated_resolution import RESOLUTION, resolution_of_adapter

_SETTING = "model.resolution"


def set_resolution(parts: ModelParts, resolution: Tiles | CrossAttention | None, *, seed: int) -> ModelParts:
    """Return a model's parts with a resolution, and new weights where it needs some that the model does not have.

    Args:
        parts: The model. Its own resolution is kept if no other is given.
        resolution: The resolution; None keeps the model's own.
        seed: Of the random weights.

    Raises:
        ConfigError: The resolution does not fit the model, which may have another kind.
        WeightsError: The model reads tiles, and the weights that this needs are missing.
    """
    config, tiles_before = parts.config, parts.config.tiles
    if resolution is not None:
        config = copy.deepcopy(config)
        config.resolution = describe_resolution(checked_resolution(resolution, _SETTING))
        _check_change(parts, config)
    if config.resolution is not None:
        _check_images(parts, config, _SETTING if resolution is not None else f"{parts.source}/config.json:{RESOLUTION}")
    tensors = dict(parts.tensors)
    if config.tiles is None:
        tensors.pop(tensor_names.NEWLINE, None)
    elif tiles_before is None:
        generator = torch.Generator().manual_seed(seed)
        width = config.text_config.hidden_size
        # As in LLaVA-NeXT.
        tensors[tensor_names.NEWLINE] = torch.randn(width, generator=generator) * width**-0.5
    elif tensor_names.NEWLINE not in tensors:
        raise WeightsError.at(
            parts.source,
            f"{tensor_names.NEWLINE} is missing: the embedding that ends each row of a tiled image's patches",
            "download or copy the weights again; or, to train a new one, remove the resolution from config.json and "
            "processor_config.json, and set model.resolution to it",
        )
    if config.cross_attention is not None:
        return _with_cross_attention(dataclasses.replace(parts, tensors=tensors), config, seed)
    return dataclasses.replace(parts, config=config, tensors=tensors)


def _with_cross_attention(parts: ModelParts, config: LlavarConfig, seed: int) -> ModelParts:
    """Return a model with its second encoder, and with a new cross-attention where it had none."""
    check_decoder(config.text_config)
    encoder: str = config.cross_attention.encoder  # type: ignore[union-attr]
    tensors, settings = dict(parts.tensors), parts.detail_settings
    if encoder != CONCAT_CLIP and not any(name.startswith(tensor_names.DETAIL_ENCODER) for name in tensors):
        # Adapters and deltas do not contain it.
        encoder_parts = read_encoder(resolve_folder(encoder, f"{_SETTING}.encoder"))
        config, settings = copy.deepcopy(config), encoder_parts.image_settings
        config.detail_config = encoder_parts.config
        tensors.update(encoder_parts.tensors)
    if parts.config.cross_attention is None:
        tensors.update(draw_cross_attention(config, seed))
    return dataclasses.replace(parts, config=config, tensors=tensors, detail_settings=settings)


def with_resolution_of(config: ModelConfig, adapters: Iterable[Path]) -> ModelConfig:
    """Return a model's settings with the resolution that adapters were trained with, where none is set.

    Raises:
        ConfigError: The resolution in an adapter's folder is damaged, or those of two adapters differ.
    """
    if config.resolution is not None:
        return config
    stated = [(folder, resolution_of_adapter(folder)) for folder in adapters]
    resolutions = [
        (folder, resolution_from(settings, f"{folder / 'config.json'}:{RESOLUTION}"))
        for folder, settings in stated
        if settings is not None
    ]
    if not resolutions:
        return config
    first_folder, first_resolution = resolutions[0]
    for folder, resolution in resolutions[1:]:
        if describe_resolution(resolution) != describe_resolution(first_resolution):
            raise ConfigError.at(
                "adapters",
                f"{first_folder} and {folder} were trained with different resolutions (model.resolution)",
                "load one of them",
            )
    return dataclasses.replace(config, resolution=first_resolution)


def _check_change(parts: ModelParts, config: LlavarConfig) -> None:
    """Reject a resolution of another kind than the checkpoint's, or with another encoder or grid of crops."""
    before, after = parts.config.resolution, config.resolution
    if before is None or after is None:
        return
    trained_settings = ("type",) if after["type"] == "tiles" else ("type", "encoder", "grid")
    for name in trained_settings:
        if before.get(name) != after[name]:
            raise ConfigError.at(
                _SETTING if name == "type" else f"{_SETTING}.{name}",
                f"not that of the checkpoint (got {after[name]!r}, expected {before.get(name)!r})",
                "leave it out, or start from a checkpoint without a resolution",
            )


def _check_images(parts: ModelParts, config: LlavarConfig, where: str) -> None:
    """Reject what a resolution cannot do with the model's images.

    Raises:
        ConfigError: The images keep their shape, or no grid of tiles fits the budget.
    """
    if parts.image_mode == "keep":
        raise ConfigError.at(
            where,
            "a model with a resolution prepares its images at the tower's size (got image_mode 'keep')",
            "set model.image_mode to pad, or remove the resolution",
        )
    tiles = config.tiles
    if tiles is not None:
        side, patch = prepared_side(parts.image_processor, parts.source), config.vision_config.patch_size
        check_budget(TileGeometry(tiles.grids, side, patch, tiles.pool, tiles.max_image_tokens), where)


def check_budget(geometry: TileGeometry, where: str) -> None:
    """Reject a limit of image tokens that the whole image and its smallest grid already exceed.

    Args:
        geometry: How the model cuts images.
        where: What to call the resolution in the message.

    Raises:
        ConfigError: States both numbers.
    """
    if geometry.budget is not None and geometry.budget < geometry.least_tokens:
        raise ConfigError.at(
            f"{where}.max_image_tokens",
            f"less than the whole image and the smallest grid need (got {geometry.budget}, expected at least "
            f"{geometry.least_tokens})",
            f"set it to {geometry.least_tokens} or more, add a smaller grid, or set pool: 2",
        )
