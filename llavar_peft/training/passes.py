"""A micro batch in several forward and backward passes, where it has more tokens than fit into one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from llavar_peft.data.packing import divide
from llavar_peft.data.sampler import bins_within

SUPERVISED = "supervised"
"""Key under which a pass is told how many supervised positions its whole micro batch has."""


def passes(
    accelerator: Accelerator, model: nn.Module, inputs: dict[str, Any], *, max_tokens: int | None
) -> Iterator[dict[str, Any]]:
    """Divides a micro batch, and lets its gradients be exchanged in the last pass only.

    Every rank makes as many passes as the one that needs most: with sharded weights each pass is a conversation between
    all ranks. Which records stand in which pass changes nothing in the loss.

    Args:
        accelerator: The run's.
        model: As it is trained, wrapped.
        inputs: A packed batch, or a padded one, which is not divided; with ``SUPERVISED``.
        max_tokens: That a pass may have; None is one pass.

    Yields:
        The batch of each pass, to be run before the next is asked for.
    """
    if max_tokens is None or "lengths" not in inputs:
        yield inputs
        return
    bins = bins_within(inputs["lengths"], max_tokens)
    if accelerator.num_processes > 1:
        wanted = torch.tensor(len(bins), device=accelerator.device)
        torch.distributed.all_reduce(wanted, op=torch.distributed.ReduceOp.MAX)
        bins += [[]] * (int(wanted) - len(bins))
    state = accelerator.gradient_state
    ends_step = state.sync_gradients
    *rows, last = divide(inputs, bins)
    # Before the step's last micro batch nothing is exchanged anyway. DeepSpeed goes by the state alone.
    with accelerator.no_sync(model) if rows and ends_step else nullcontext():
        state._set_sync_gradients(False)
        for row in rows:
            yield {**row, SUPERVISED: inputs[SUPERVISED]}
    state._set_sync_gradients(ends_step)
    yield {**last, SUPERVISED: inputs[SUPERVISED]}
