"""What an image costs: its tokens in the language model, and the views of it that the vision tower gets."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llavar_peft.data.tile_layout import TileGeometry
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.model_resolution import check_budget


@dataclass(frozen=True, slots=True)
class ImageCost:
    """What an image costs.

    Attributes:
        tokens: Number of its tokens in the language model.
        views: Number of images of the tower's size: the whole, and its tiles.
        projected: Number of patches of a view that reach the projector.
    """

    tokens: int
    views: int
    projected: int


@dataclass(frozen=True, slots=True)
class DetailShape:
    """The features that a layer's cross-attention gets in a pass.

    Attributes:
        images: Number of images; 0 computes the modules once on a zero.
        features: Number of features of an image.
        width: Width of the features.
    """

    images: int
    features: int
    width: int


def detail_shape(config: LlavarConfig, views: int) -> DetailShape | None:
    """Return the features of the cross-attention; None for a model without it.

    Args:
        config: The model's configuration.
        views: Number of images that the tower gets: the whole ones, and their crops.
    """
    if config.cross_attention is None:
        return None
    crops = config.cross_attention.grid**2
    width = int(config.vision_config.hidden_size)
    return DetailShape(round(views / (1 + crops)), crops * int(config.image_seq_length), width)


def tile_geometry(config: LlavarConfig) -> TileGeometry | None:
    """Return how a model cuts images into tiles; None without tiles.

    Raises:
        ConfigError: No grid fits the limit of image tokens.
    """
    tiles = config.tiles
    if tiles is None:
        return None
    patch = int(config.vision_config.patch_size)
    side = math.isqrt(config.image_seq_length) * patch
    geometry = TileGeometry(tiles.grids, side, patch, tiles.pool, tiles.max_image_tokens)
    check_budget(geometry, "model.resolution")
    return geometry


def image_cost(config: LlavarConfig, most: int) -> ImageCost:
    """Return the cost of an image; with tiles, of one that fills the largest grid, without padding.

    Args:
        config: The model's configuration.
        most: Maximum number of its tokens, where a smaller grid has fewer.
    """
    geometry = tile_geometry(config)
    if geometry is None:
        grid = config.cross_attention.grid if config.cross_attention is not None else 0
        return ImageCost(config.image_seq_length, 1 + grid**2, config.image_seq_length)
    side = geometry.patches
    costs = [
        ImageCost(geometry.tokens((rows, columns, rows * side, columns * side)), 1 + rows * columns, side**2)
        for rows, columns in geometry.grids
    ]
    limit = most if geometry.budget is None else min(most, geometry.budget)
    fitting = [cost for cost in costs if cost.tokens <= limit]
    if not fitting:
        return min(costs, key=lambda cost: cost.tokens)
    return max(fitting, key=lambda cost: cost.tokens)
