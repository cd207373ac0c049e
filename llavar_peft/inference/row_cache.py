"""The keys and values of the rows of a batch, which join and leave it at any time.

Shape suffixes: B rows, W width of the cache.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache


def cache_layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values of each layer, ``[B, heads, W, width]``."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def make_cache(layers: Iterable[tuple[Tensor, Tensor]]) -> DynamicCache:
    """Return a cache of these keys and values, which are not copied: a cache makes new tensors when it grows."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys[:, :, :0], values[:, :, :0], index)  # adds an empty layer
        cache.layers[index].keys, cache.layers[index].values = keys, values
    return cache


def join_caches(
    one: DynamicCache, mask_one: Tensor, two: DynamicCache, mask_two: Tensor
) -> tuple[DynamicCache, Tensor]:
    """Append the rows of the second cache to those of the first; the narrower one is padded on the left.

    The masks are ``[B, W]``, 0 at padding.
    """
    if not len(mask_one):
        return two, mask_two
    width = max(mask_one.shape[1], mask_two.shape[1])

    def joined(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([pad(part, (0, 0, width - part.shape[2], 0)) for part in (first, second)])

    layers = (
        (joined(keys_one, keys_two), joined(values_one, values_two))
        for (keys_one, values_one), (keys_two, values_two) in zip(cache_layers(one), cache_layers(two), strict=True)
    )
    masks = [pad(mask, (width - mask.shape[1], 0)) for mask in (mask_one, mask_two)]
    return make_cache(layers), torch.cat(masks)
