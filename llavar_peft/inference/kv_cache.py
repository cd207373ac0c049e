"""Caches of keys and values as values: taken apart, put together, joined."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import DynamicCache


def cache_layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, ``[B, heads, W, width]``."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def make_cache(layers: Iterable[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache of these keys and values, which are copied; of none, an empty one."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


def join_caches(
    one: DynamicCache, mask_one: Tensor, two: DynamicCache, mask_two: Tensor
) -> tuple[DynamicCache, Tensor]:
    """Put the rows of two batches into one, the narrower ones padded on the left.

    Args:
        one: The first rows; may be empty.
        mask_one: Theirs, ``[B, W]``, 0 at padding.
        two: The rows behind them.
        mask_two: Theirs.

    Returns:
        The cache of all rows, and their mask.
    """
    if not len(mask_one):
        return two, mask_two
    width = max(mask_one.shape[1], mask_two.shape[1])

    def joined(first: Tensor, second: Tensor) -> Tensor:
        pad = torch.nn.functional.pad
        return torch.cat([pad(part, (0, 0, width - part.shape[2], 0)) for part in (first, second)])

    layers = (
        (joined(keys_one, keys_two), joined(values_one, values_two))
        for (keys_one, values_one), (keys_two, values_two) in zip(cache_layers(one), cache_layers(two), strict=True)
    )
    masks = [torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in (mask_one, mask_two)]
    return make_cache(layers), torch.cat(masks)
