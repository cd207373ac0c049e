"""Stop before an optimizer step on a loss or gradient that is not finite, and name the records."""

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
    """Check the losses and the gradient of an optimizer step before it is taken. All ranks stop together.

    Args:
        accelerator: The accelerator of the run. With fp16 it scales the loss and skips a step whose gradient overflows,
            so that only the losses are checked.
        losses: Loss of each micro batch of the step on this rank, with the ids of its records.
        norm: Norm of the gradient over all ranks, before clipping.
        where: Stage and step, for the message.

    Raises:
        EnvironmentFaultError: A loss or the gradient is not finite.
    """
    finite = torch.stack([loss for loss, _ in losses]).isfinite().tolist()
    bad = [record for (_, ids), good in zip(losses, finite, strict=True) for record in ids if not good]
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
        "nothing was updated; check these records, lower the learning rate, or train in bf16 instead of fp16",
    )
