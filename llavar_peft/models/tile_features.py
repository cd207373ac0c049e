"""Arrange the features of an image's views as its sequence of image tokens: the whole image, then the rows of tiles.

Shape suffixes: V views of all images, P patches of a view, Q patches after pooling, F features of an image, D width.

Source: LLaVA-NeXT (January 2024), as ``pack_image_features`` in ``transformers``, with the newline embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from llavar_peft.data.tile_layout import view_count
from llavar_peft.types import TileLayout


def pool_patches(features_VPC: Tensor, pool: int) -> Tensor:
    """Average neighbouring patches.

    Args:
        features_VPC: Features of square views.
        pool: Number of patches in each direction; those that are missing at the edge do not count.

    Returns:
        ``[V, Q, C]``.
    """
    if pool == 1:
        return features_VPC
    side = math.isqrt(features_VPC.shape[1])
    grid_VCHW = features_VPC.transpose(1, 2).reshape(len(features_VPC), -1, side, side)
    pooled_VCHW = avg_pool2d(grid_VCHW, pool, ceil_mode=True, count_include_pad=False)
    return pooled_VCHW.flatten(2).transpose(1, 2)


def arrange_tiles(features_VQD: Tensor, layouts: Sequence[TileLayout], newline_D: Tensor) -> list[Tensor]:
    """Join the views of each image to its sequence of features, without those of the padding.

    Args:
        features_VQD: Projected features of the views of all images.
        layouts: How each image is cut.
        newline_D: Ends each row of patches.

    Returns:
        The features ``[F, D]`` of each image.

    Raises:
        ValueError: The views are not those of the layouts.
    """
    views = list(map(view_count, layouts))
    if sum(views) != len(features_VQD):
        raise ValueError(f"forward: got {len(features_VQD)} views of images, expected {sum(views)} by image_layouts")
    each = torch.split(features_VQD, views)
    return [_arrange(one_VQD, layout, newline_D) for one_VQD, layout in zip(each, layouts, strict=True)]


def _arrange(features_VQD: Tensor, layout: TileLayout, newline_D: Tensor) -> Tensor:
    side = math.isqrt(features_VQD.shape[1])
    rows, columns, kept_rows, kept_columns = layout
    tiles_RCHWD = features_VQD[1:].view(rows, columns, side, side, -1)
    grid_YXD = tiles_RCHWD.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)
    top, left = (rows * side - kept_rows) // 2, (columns * side - kept_columns) // 2
    kept_YXD = grid_YXD[top : top + kept_rows, left : left + kept_columns]
    ends_Y1D = newline_D.to(kept_YXD.dtype).expand(kept_rows, 1, -1)
    return torch.cat([features_VQD[0], torch.cat([kept_YXD, ends_Y1D], dim=1).flatten(0, 1)])
