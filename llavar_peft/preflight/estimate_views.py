"""What an image costs: its tokens in the language model, and the views of it that the vision tower gets."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llavar_peft.data.tile_layout import TileGeometry
from llavar_peft.models.detail_encoder import PIX2STRUCT, PIX2STRUCT_PATCHES
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
    """The features that a layer's cross-attention gets.

    Attributes:
        features: Number of features of an image.
        width: Width of the features.
        crops: Number of crops of an image that the tower gets; 0 where another encoder sees the whole.
    """

    features: int
    width: int
    crops: int


def detail_shape(config: LlavarConfig) -> DetailShape | None:
    """Return the features of the cross-attention; None for a model without it."""
    if config.cross_attention is None:
        return None
    encoder = config.detail_config
    if encoder is None:
        crops = config.cross_attention.grid**2
        return DetailShape(crops * int(config.image_seq_length), int(config.vision_config.hidden_size), crops)
    features = PIX2STRUCT_PATCHES
    if encoder["model_type"] not in PIX2STRUCT:
        features = (int(encoder["image_size"]) // int(encoder["patch_size"])) ** 2
    return DetailShape(features, int(encoder["hidden_size"]), 0)


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


def image_cost(config: LlavarConfig, most: int, *, images: int = 1) -> ImageCost:
    """Return the cost of an image; with tiles, of one that fills the largest grid, without padding.

    Args:
        config: The model's configuration.
        most: Maximum number of its tokens, where a smaller grid has fewer.
        images: Number of images of its record, which share the model's limit of image tokens.
    """
    geometry = tile_geometry(config)
    if geometry is None:
        details = detail_shape(config)
        crops = 0 if details is None else details.crops
        return ImageCost(config.image_seq_length, 1 + crops, config.image_seq_length)
    costs = [ImageCost(tokens, 1 + tiles, geometry.patches**2) for tiles, tokens in _tokens_by_grid(geometry)]
    limit = most if geometry.budget is None else min(most, geometry.budget // images)
    fitting = [cost for cost in costs if cost.tokens <= limit]
    if not fitting:
        return min(costs, key=lambda cost: cost.tokens)
    return max(fitting, key=lambda cost: cost.tokens)


def tokens_by_tiles(config: LlavarConfig) -> dict[int, tuple[int, int]]:
    """Return the least and the most tokens of an image by the number of its tiles; empty for a model without tiles."""
    geometry = tile_geometry(config)
    found: dict[int, tuple[int, int]] = {}
    for tiles, tokens in [] if geometry is None else sorted(_tokens_by_grid(geometry)):
        found[tiles] = (min(tokens, *found.get(tiles, (tokens,))), max(tokens, *found.get(tiles, (tokens,))))
    return found


def _tokens_by_grid(geometry: TileGeometry) -> list[tuple[int, int]]:
    """Return the number of tiles of each grid, and the tokens of an image that fills it."""
    side = geometry.patches
    return [
        (rows * columns, geometry.tokens((rows, columns, rows * side, columns * side)))
        for rows, columns in geometry.grids
    ]
