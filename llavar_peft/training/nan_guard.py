"""No optimizer step on a loss or a gradient that is not finite; the records at fault are named."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from llavar_peft.errors import EnvironmentFaultError
from llavar_peft.training.rank_agreement import on_any_rank

_SHOWN = 16


def check_finite(
    accelerator: Accelerator, losses: Sequence[tuple[Tensor, tuple[str, ...]]], norm: float, *, where: str
) -> None:
    """Look at an optimizer step before it is taken. All ranks stop together.

    Args:
        accelerator: The run's. With fp16 it scales the loss, finds overflowing gradients itself and passes such a step
            by; there only the losses are looked at.
        losses: Of the step's micro batches on this rank, each with its records.
        norm: Of the gradient, over all ranks.
        where: Stage and step.

    Raises:
        EnvironmentFaultError: A loss or the gradient is not finite.
    """
    finite = torch.stack([loss for loss, _ in losses]).isfinite().tolist()
    guilty = [record for (_, ids), good in zip(losses, finite, strict=True) for record in ids if not good]
    overflowed = accelerator.scaler is None and not math.isfinite(norm)
    if not on_any_rank(bool(guilty) or overflowed, accelerator.device):
        return
    blamed = gather_object(guilty)
    what = "the loss is not finite" if blamed else f"the gradient is not finite (norm {norm})"
    records = blamed or gather_object([record for _, ids in losses for record in ids])
    more = f" and {len(records) - _SHOWN} more" if len(records) > _SHOWN else ""
    raise EnvironmentFaultError.at(
        where,
        f"{what}, records {', '.join(records[:_SHOWN])}{more}",
        "look at these records, lower the learning rate, or train in bf16 instead of fp16; nothing was updated",
    )
