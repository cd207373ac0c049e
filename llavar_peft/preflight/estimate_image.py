"""The bytes that a pass needs for its images, in the vision tower and the projector, measured without memory."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from transformers import AutoModel

from llavar_peft.compat.dependency_internals import fake_tensors
from llavar_peft.compat.memory_tracker import MemoryTracker
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.tile_features import pool_patches
from llavar_peft.models.vision_tower import make_projector, tower_features
from llavar_peft.preflight.estimate_layer import LayerDtypes, replace_meta

_LAYERS = 2
"""Layers of the tower that are run; the others need no more memory, because nothing of them is kept."""


@dataclass(frozen=True, slots=True)
class ImageMemory:
    """Bytes of the images of a pass, without parameters.

    Attributes:
        tower: Peak of the vision tower, with the pixels.
        kept: What the projector keeps for the backward pass.
    """

    tower: int
    kept: int


def measure_images(config: LlavarConfig, dtypes: LayerDtypes, *, images: int, trained: bool) -> ImageMemory:
    """Measure a frozen vision tower and the projector.

    Args:
        config: The model's configuration.
        dtypes: Number formats, as for the language model's layers.
        images: Number of images of the tower's size in the pass.
        trained: Whether the projector is trained.
    """
    if images == 0:
        return ImageMemory(0, 0)
    vision, text = copy.deepcopy(config.vision_config), config.text_config
    vision.num_hidden_layers = min(_LAYERS, vision.num_hidden_layers)
    side = math.isqrt(config.image_seq_length) * vision.patch_size
    with torch.device("meta"):
        tower = AutoModel.from_config(vision, attn_implementation="sdpa", trust_remote_code=False)
        tower.requires_grad_(False)
        projector = make_projector(config.projector_hidden_act, vision.hidden_size, text.hidden_size, config.tiles)
        projector.requires_grad_(trained)
    autocast = torch.autocast(
        "cpu", dtype=dtypes.autocast or torch.bfloat16, enabled=dtypes.autocast is not None, cache_enabled=False
    )
    with fake_tensors(), MemoryTracker() as tracker, autocast:
        replace_meta(tower, dtypes.frozen, dtypes.trained)
        replace_meta(projector, dtypes.frozen, dtypes.trained)
        before = tracker.now
        tracker.reset_peak()
        pixels = torch.zeros(images, 3, side, side)
        with torch.no_grad():
            features = tower_features(tower, pixels.to(dtypes.frozen), vision.num_hidden_layers)
        peak = tracker.reset_peak() - before
        before = tracker.now
        patches = pool_patches(features[:, features.shape[1] - config.image_seq_length :], projector.pool)
        output = projector.project(patches)
        return ImageMemory(peak, tracker.now - before - output.untyped_storage().nbytes())
