"""The parameters and the memory of a vision tower that a stage trains, measured on tensors without memory."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig

from llavar_peft.compat.dependency_internals import fake_tensors
from llavar_peft.compat.memory_tracker import MemoryTracker
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.tower_tuning import TOWER
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.models.vision_tower import tower_features
from llavar_peft.preflight.estimate_layer import LayerDtypes, replace_meta
from llavar_peft.recipe.schema import Lora, Tune
from llavar_peft.recipe.schema_rules import tunes_tower

_SMALL = LlamaConfig(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8, pad_token_id=0
)

_MEASURED = (2, 3)
"""Numbers of layers of the towers that are measured."""


@dataclass(frozen=True, slots=True)
class TowerMemory:
    """Bytes of a trained tower, without its parameters.

    Attributes:
        kept: All that is kept from the forward to the backward pass.
        backward: Peak of the backward pass, with what is kept, and the gradients that it makes.
    """

    kept: int = 0
    backward: int = 0


def count_trained_tower(config: LlavarConfig, tune: Tune) -> int:
    """Return how many parameters a stage trains in the vision tower: its own, or those of adapters."""
    if not tunes_tower(tune):
        return 0
    parameters = _tuned(config, tune).named_parameters()
    return sum(one.numel() for name, one in parameters if TOWER in name and one.requires_grad)


def measure_tower(
    config: LlavarConfig, tune: Tune, dtypes: LayerDtypes, *, images: int, recomputes: bool, accumulated: bool
) -> TowerMemory:
    """Measure the vision tower in the forward and backward pass of a stage; a frozen one keeps nothing.

    Args:
        config: The model's configuration.
        tune: What the stage trains.
        dtypes: Number formats.
        images: Number of images of the pass.
        recomputes: Whether activations are recomputed.
        accumulated: Whether gradients of an earlier pass exist, to which those of this pass are added.
    """
    if not tunes_tower(tune):
        return TowerMemory()
    with torch.device("meta"):
        layers = LlavarForConditionalGeneration(_without_language_model(config)).model.num_tower_layers()
    few, more = (
        _measure_layers(config, tune, dtypes, count, images=images, recomputes=recomputes, accumulated=accumulated)
        for count in _MEASURED
    )
    # Memory is linear in the number of layers, each of which takes a moment to measure.
    return TowerMemory(
        few.kept + (more.kept - few.kept) * (layers - _MEASURED[0]),
        few.backward + (more.backward - few.backward) * (layers - _MEASURED[0]),
    )


def _measure_layers(
    config: LlavarConfig,
    tune: Tune,
    dtypes: LayerDtypes,
    layers: int,
    *,
    images: int,
    recomputes: bool,
    accumulated: bool,
) -> TowerMemory:
    """Measure a tower of which this number of layers is computed, at least one."""
    config = copy.deepcopy(config)
    config.vision_config.num_hidden_layers, config.vision_feature_layer = layers + 1, -2
    trained = _tuned(config, tune).train()
    if recomputes:
        trained.gradient_checkpointing_enable({"use_reentrant": False})
    model = trained.get_base_model() if isinstance(tune, Lora) else trained
    tower, side = model.model.vision_tower, config.vision_config.image_size
    with fake_tensors(), MemoryTracker() as tracker:
        replace_meta(tower, dtypes.frozen, dtypes.trained)
        for parameter in tower.parameters():
            if accumulated and parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        before = tracker.now
        pixels = torch.zeros(images, 3, side, side)
        with torch.autocast(
            "cpu", dtype=dtypes.autocast or torch.bfloat16, enabled=dtypes.autocast is not None, cache_enabled=False
        ):
            features = tower_features(tower, pixels, model.model.num_tower_layers())
        kept = tracker.now - before
        tracker.reset_peak()
        torch.autograd.backward(features, torch.empty_like(features))
        return TowerMemory(kept, tracker.peak - before)


def _without_language_model(config: LlavarConfig) -> LlavarConfig:
    small = copy.deepcopy(config)
    small.text_config, small.use_im_start_end = _SMALL, False
    return small


def _tuned(config: LlavarConfig, tune: Tune) -> Any:
    """Return a tuned model on ``meta`` that has the tower, and a language model of no size."""
    small = _without_language_model(config)
    if isinstance(tune, Lora):
        # PiSSA's initialization needs the weights' values; its tensors are those of plain LoRA.
        variant = "lora" if tune.variant == "pissa" else tune.variant
        tune = dataclasses.replace(tune, variant=variant, target="all-linear", train_image_rows=False)
    with torch.device("meta"):
        return apply_tuning(LlavarForConditionalGeneration(small), tune)
