"""What a training batch without an image does, so that every rank uses the same modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled

from llavar_peft.models.rank_agreement import largest_of_ranks
from llavar_peft.types import TileLayout


def missing_projector_calls(pixel_values: Tensor | Sequence[Tensor] | None) -> int:
    """Return how often a training batch calls the projector without an image.

    As in the original, the projector's gradient must exist on every rank, whichever rank has images; so must the
    tower's, if it is trained. ZeRO-3 gathers a module's weights when the module is called, so that every rank has
    to call tower and projector equally often, whatever number of images and sizes (image mode ``keep``) it has.

    Args:
        pixel_values: The images of the batch, as ``LlavarModel.forward`` takes them.
    """
    if pixel_values is None or isinstance(pixel_values, Tensor):
        calls = int(pixel_values is not None)
    else:
        calls = len({image.shape for image in pixel_values})  # one for each size
    if is_deepspeed_zero3_enabled():
        # Before the first call: a rank that waits here would not take part in gathering another rank's modules.
        calls_of_any = largest_of_ranks(calls)
        return max(calls_of_any, 1) - calls
    return 0 if calls else 1


def zero_through_projector(model: Any, *, through_tower: bool) -> Tensor:
    """Return a zero that depends on the projector; with ZeRO-3, or if it is trained, on the tower as well.

    Args:
        model: A ``LlavarModel``.
        through_tower: Whether the tower is trained.
    """
    # With tiles, an image of a single tile, of which a single patch is no padding.
    tiled = model.config.tiles is not None
    layouts: list[TileLayout] = [(1, 1, 1, 1)] if tiled else []
    if is_deepspeed_zero3_enabled() or through_tower:
        size, tower = model.config.vision_config.image_size, next(model.vision_tower.parameters())
        black_V3HW = torch.zeros(1 + tiled, 3, size, size, dtype=tower.dtype, device=tower.device)
        features_PD: Tensor = model.get_image_features(black_V3HW, image_layouts=layouts or None).pooler_output[0]
        return features_PD.sum() * 0.0
    weight, width = next(model.multi_modal_projector.parameters()), model.config.vision_config.hidden_size
    zeros_V1C = torch.zeros(1 + tiled, 1, width, dtype=weight.dtype, device=weight.device)
    projected_PD: Tensor = model.multi_modal_projector(zeros_V1C, *([layouts] if tiled else []))[0]
    return projected_PD.sum() * 0.0
