"""One optimizer step: its counts and log line, the check of loss and gradient before it, its parameter groups."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from llavar_peft.errors import EnvironmentFaultError
from llavar_peft.models.tuning import part_of
from llavar_peft.recipe.schema import OptimConfig
from llavar_peft.training.rank_agreement import on_any_rank

_SHOWN = 16


@dataclass
class StepCounts:
    """Counts of the current optimizer step on this rank."""

    tokens: int = 0
    supervised: int = 0
    losses: list[tuple[Tensor, tuple[str, ...]]] = field(default_factory=list)
    started: float = 0.0

    def figures(self, accelerator: Accelerator) -> dict[str, Any]:
        """Return tokens of all ranks, seconds and peak memory of the step. Every rank must call this."""
        seconds = time.perf_counter() - self.started if self.started else 0.0
        counts = torch.tensor([self.tokens, self.supervised], device=accelerator.device)
        tokens, supervised = accelerator.reduce(counts, reduction="sum").tolist()
        figures: dict[str, Any] = {
            "tokens": tokens,
            "supervised_tokens": supervised,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        }
        if torch.cuda.is_available():
            figures["peak_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
        return figures


def check_finite(
    accelerator: Accelerator, losses: Sequence[tuple[Tensor, tuple[str, ...]]], norm: float, *, where: str
) -> None:
    """Check the losses and the gradient of an optimizer step before it is taken. All ranks stop together.

    Args:
        accelerator: The accelerator of the run.
        losses: Loss of each micro batch of the step on this rank, with the ids of its records.
        norm: Norm of the gradient over all ranks, before clipping.
        where: Stage and step, for the message.

    Raises:
        EnvironmentFaultError: A loss or the gradient is not finite.
    """
    finite = torch.stack([loss for loss, _ in losses]).isfinite().tolist()
    bad = [record for (_, ids), good in zip(losses, finite, strict=True) for record in ids if not good]
    # With fp16, the scaler skips a step whose gradient overflows.
    overflowed = accelerator.scaler is None and not math.isfinite(norm)
    if not on_any_rank(bool(bad) or overflowed, accelerator.device):
        return
    bad = gather_object(bad)
    what = "the loss is not finite" if bad else f"the gradient is not finite (norm {norm})"
    records = bad or gather_object([record for _, ids in losses for record in ids])
    more = f" and {len(records) - _SHOWN} more" if len(records) > _SHOWN else ""
    raise EnvironmentFaultError.at(
        where,
        f"{what}, records {', '.join(records[:_SHOWN])}{more}",
        "nothing of this step is saved; check these records, lower the learning rate, or train in bf16 instead of fp16",
    )


def split_groups(optimizer: torch.optim.Optimizer, model: nn.Module, optim: OptimConfig) -> None:
    """Divide an optimizer's groups by part of the model where parts have their own learning rate, in place."""
    rates = {"projector": optim.projector_learning_rate, "rows": optim.rows_learning_rate}
    if all(rate is None for rate in rates.values()):
        return
    parts = {p: part_of(n) for n, p in model.named_parameters() if p.requires_grad}
    optimizer.param_groups = [
        {**group, "params": params, "name": part, "lr": rates.get(part) or optim.learning_rate}
        for part in dict.fromkeys([*sorted(set(parts.values()) - set(rates)), *rates])
        for group in optimizer.param_groups
        if (params := [parameter for parameter in group["params"] if parts[parameter] == part])
    ]


def learning_rates(groups: Sequence[Mapping[str, Any]], rate: float) -> dict[str, float]:
    """Return the learning rate of each named group, given that of the first group."""
    named = [group for group in groups if "name" in group]
    # All groups share the schedule, so that their rates differ by the ratio of their peaks.
    return {group["name"]: rate * group["initial_lr"] / named[0]["initial_lr"] for group in named}
