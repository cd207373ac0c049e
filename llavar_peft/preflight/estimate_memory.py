"""The memory of one GPU at its peak, by part."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.preflight.estimate_counts import Counts, count_parameters, count_trained
from llavar_peft.preflight.estimate_moments import StepMoments
from llavar_peft.recipe.schema import ModelConfig, Stage

_STATES = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 256, "paged_adamw_8bit": 2.0 + 8 / 256}
"""Bytes per trained weight: two moments, in float32 or in 8 bits with a float32 scale per 256."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU at the moment of its peak.

    Attributes:
        weights: All weights, in their storage format.
        gradients: Gradients of the trained weights, in float32, as far as they exist at that moment.
        optimizer: The optimizer's moments.
        activations: Tensors kept for the backward pass, and temporary ones of the layer in progress.
        logits: Logits of a chunk of positions, and the gradient of ``lm_head``.
        other: Weights gathered and gradients copied for communication, decompressed weights, and the optimizer's
            temporary memory.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    other: int

    @property
    def peak(self) -> int:
        """The sum of all parts, without about 1 GiB that CUDA itself uses and PyTorch does not count."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.other


def estimate_memory(
    config: LlavarConfig,
    model: ModelConfig,
    stage: Stage,
    *,
    tokens: int,
    supervised: int,
    gpus: int,
    sharded: bool,
    counts: Counts | None = None,
) -> Memory:
    """Estimate the memory of one GPU at its peak.

    Args:
        config: The model's configuration.
        model: How its weights are stored.
        stage: What is trained.
        tokens: Tokens of the largest forward pass on a GPU.
        supervised: Number of these tokens that have a label.
        gpus: Number of GPUs.
        sharded: Whether weights, gradients and optimizer states are sharded over them, layer by layer.
        counts: The model's parameters, if they have been counted.
    """
    counts = counts or count_parameters(config, stage.tune)
    trained = count_trained(config, stage.tune, counts)
    step = StepMoments(
        config, model, stage, counts, trained=trained, tokens=tokens, supervised=supervised, gpus=gpus, sharded=sharded
    )
    parts = {
        "weights": step.weights,
        "optimizer": _STATES[stage.optim.optimizer] * trained / step.shards,
        **max(step.moments(), key=lambda moment: sum(moment.values())),
    }
    if gpus > 1 and not sharded:
        parts["other"] += 4.0 * trained  # DDP copies the gradients into buckets
    return Memory(**{field.name: round(parts[field.name]) for field in dataclasses.fields(Memory)})
