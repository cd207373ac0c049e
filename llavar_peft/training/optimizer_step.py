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
from torch.distributed.tensor import DTensor

from llavar_peft.errors import EnvironmentFaultError
from llavar_peft.models.tuning import part_of
from llavar_peft.recipe.schema import Full, Projector, Stage
from llavar_peft.recipe.schema_rules import tunes_tower

_SHOWN = 16  # records in a message
_TOWER_SHARE = 0.2
"""Learning rate of a tower that is trained in full, as a share of the stage's. Source: LLaVA-NeXT, 2e-6 and 1e-5."""


@dataclass
class StepCounts:
    """Counts and losses of the current optimizer step on this rank."""

    tokens: int = 0
    supervised: int = 0
    losses: list[tuple[Tensor, tuple[str, ...]]] = field(default_factory=list)
    """Loss of each micro batch, with the ids of its records."""
    started: float = 0.0


@dataclass(frozen=True)
class StepFigures:
    """What the host knows of an optimizer step, the same on all ranks.

    Attributes:
        loss: Mean over the ranks.
        norm: Norm of the gradient over all ranks, before clipping.
        tokens: Of all ranks.
        supervised: Supervised tokens of all ranks.
        finite_loss: Whether the losses of all ranks are finite.
    """

    loss: float = 0.0
    norm: float = 0.0
    tokens: int = 0
    supervised: int = 0
    finite_loss: bool = True


def fetch_figures(accelerator: Accelerator, counts: StepCounts, norm: Tensor | float) -> StepFigures:
    """Fetch all figures of an optimizer step in one transfer, the only one for which the host waits for the device.

    Every rank must call this.

    Args:
        accelerator: The accelerator of the run.
        counts: Those of this rank; they contain the losses of all micro batches.
        norm: Norm of the gradient over all ranks; DeepSpeed gives a number.
    """
    loss = counts.losses[0][0]
    for micro_batch_loss, _ in counts.losses[1:]:
        loss = loss + micro_batch_loss
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    # A rank's row: the loss, the norm, and the counts. What is on the device precedes what the host knows already.
    norm_on_device = [norm.to(loss)] if isinstance(norm, Tensor) else []
    norm_on_host = [] if isinstance(norm, Tensor) else [norm]
    from_device = torch.stack([loss, *norm_on_device])
    from_host = [*norm_on_host, float(counts.tokens), float(counts.supervised)]
    if accelerator.num_processes == 1:
        rows = [[*from_device.tolist(), *from_host]]
    else:
        row = torch.cat([from_device, torch.tensor(from_host).to(from_device, non_blocking=True)])
        rows = accelerator.gather(row).view(-1, len(row)).tolist()
    losses, norms, tokens, supervised = zip(*rows, strict=True)
    return StepFigures(
        # In float32, as the losses are.
        loss=torch.tensor(losses, dtype=torch.float32).mean().item(),
        norm=max(norms, key=lambda value: (not math.isfinite(value), value)),
        tokens=int(sum(tokens)),
        supervised=int(sum(supervised)),
        finite_loss=all(map(math.isfinite, losses)),
    )


def log_line(figures: StepFigures, started: float) -> dict[str, Any]:
    """Return tokens, seconds and peak memory of a step.

    Args:
        figures: Of the step.
        started: The time at which the step began; 0 is unknown.
    """
    seconds = time.perf_counter() - started if started else 0.0
    line: dict[str, Any] = {
        "tokens": figures.tokens,
        "supervised_tokens": figures.supervised,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(figures.tokens / seconds, 1) if seconds else None,
    }
    if torch.cuda.is_available():
        line["peak_memory_mb"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return line


def check_finite(accelerator: Accelerator, counts: StepCounts, figures: StepFigures, *, where: str) -> None:
    """Check the losses and the gradient of an optimizer step before it is taken. All ranks stop together.

    Args:
        accelerator: The accelerator of the run.
        counts: Those of this rank.
        figures: Those of all ranks.
        where: Stage and step, for the message.

    Raises:
        EnvironmentFaultError: A loss or the gradient is not finite.
    """
    # With fp16, the scaler skips a step whose gradient overflows.
    if figures.finite_loss and (accelerator.scaler is not None or math.isfinite(figures.norm)):
        return
    finite = torch.stack([loss for loss, _ in counts.losses]).isfinite().tolist()
    bad_on_this_rank = [
        record
        for (_, records), is_finite in zip(counts.losses, finite, strict=True)
        for record in records
        if not is_finite
    ]
    bad = gather_object(bad_on_this_rank)
    what = "the loss is not finite" if bad else f"the gradient is not finite (norm {figures.norm})"
    records = bad or gather_object([record for _, ids in counts.losses for record in ids])
    more = f" and {len(records) - _SHOWN} more" if len(records) > _SHOWN else ""
    raise EnvironmentFaultError.at(
        where,
        f"{what}, records {', '.join(records[:_SHOWN])}{more}",
        "nothing of this step is saved; check these records, lower the learning rate, or train in bf16 instead of fp16",
    )


def split_groups(optimizer: torch.optim.Optimizer, model: nn.Module, stage: Stage) -> None:
    """Divide an optimizer's groups by part of the model where parts have their own learning rate, in place."""
    optim = stage.optim
    rates = {
        "projector": optim.projector_learning_rate,
        "rows": optim.rows_learning_rate,
        "tower": tower_learning_rate(stage),
    }
    if all(rate is None for rate in rates.values()):
        return
    part_of_parameter = {
        parameter: part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    # The parts with the stage's own rate come first: the log states the rate of the first group as that of the step.
    with_stage_rate = sorted(set(part_of_parameter.values()) - set(rates))
    groups: list[dict[str, Any]] = []
    for part in (*with_stage_rate, *rates):
        for group in optimizer.param_groups:
            parameters = [parameter for parameter in group["params"] if part_of_parameter[parameter] == part]
            if parameters:
                rate = rates.get(part) or optim.learning_rate
                groups.append({**group, "params": parameters, "name": part, "lr": rate})
    optimizer.param_groups = groups


def tower_learning_rate(stage: Stage) -> float | None:
    """Return the peak learning rate of the vision tower, if it is trained with another one than the stage's."""
    if isinstance(stage.tune, Projector) or not tunes_tower(stage.tune):
        return None
    if stage.tune.tower_learning_rate is None and isinstance(stage.tune, Full):
        return _TOWER_SHARE * stage.optim.learning_rate
    return stage.tune.tower_learning_rate


def learning_rates(groups: Sequence[Mapping[str, Any]], rate: float) -> dict[str, float]:
    """Return the learning rate of each named group, given that of the first group."""
    named = [group for group in groups if "name" in group]
    # All groups share the schedule, so that their rates differ by the ratio of their peaks.
    return {group["name"]: rate * group["initial_lr"] / named[0]["initial_lr"] for group in named}
