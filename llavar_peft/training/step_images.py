"""One call of the frozen vision tower for the images of several micro batches of an optimizer step.

A call launches some hundred kernels, for one image as for many. What is kept of an image instead, the features of its
patches in the format of the computation, takes less memory than the image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

IMAGES = 16
"""Largest number of images in a call. Their activations are gone before those of the language model need memory."""


def share_tower_calls(model: Any, batches: Sequence[dict[str, Any]]) -> None:
    """Replace the images of micro batches by the features of their patches, in place.

    Micro batches stay as they are if they have images of several sizes, or as many as a call takes; all do if the tower
    is trained, or has to be called by the sharded model itself.

    Args:
        model: A LLaVAR, or a ``PeftModel`` around one, without the wrapper of sharded training.
        batches: From ``Collator``, on the model's device.
    """
    plain = (model.get_base_model() if hasattr(model, "peft_config") else model).model
    if any(parameter.requires_grad for parameter in plain.vision_tower.parameters()):
        return
    for group in _groups(batches):
        images = [batch["pixel_values"] for batch in group]
        features = plain.get_patch_features(torch.cat(images))
        for batch, own in zip(group, features.split([len(one) for one in images]), strict=True):
            batch["pixel_values"] = own


def _groups(batches: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield groups of at least two micro batches whose images have one size and fit into a call."""
    group: list[dict[str, Any]] = []
    for batch in batches:
        images = batch.get("pixel_values")
        if not isinstance(images, Tensor):
            continue
        total = sum(len(one["pixel_values"]) for one in group) + len(images)
        if group and (total > IMAGES or group[0]["pixel_values"].shape[1:] != images.shape[1:]):
            if len(group) > 1:
                yield group
            group = []
        group.append(batch)
    if len(group) > 1:
        yield group
