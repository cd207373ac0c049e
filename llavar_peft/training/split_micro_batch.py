"""A micro batch in several forward and backward passes, where it has more tokens than fit into one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from llavar_peft.data.epoch_sampler import bins_under_limit
from llavar_peft.data.training_dataset import split_batch

SUPERVISED = "supervised"
"""Key under which a pass is told how many supervised positions its whole micro batch has."""


def split_micro_batch(
    accelerator: Accelerator, model: nn.Module, inputs: dict[str, Any], *, max_tokens: int | None
) -> Iterator[dict[str, Any]]:
    """Divide a micro batch, and lets its gradients be exchanged in the last pass only.

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
    bins = bins_under_limit(inputs["lengths"], max_tokens)
    if accelerator.num_processes > 1:
        expected = torch.tensor(len(bins), device=accelerator.device)
        torch.distributed.all_reduce(expected, op=torch.distributed.ReduceOp.MAX)
        bins += [[]] * (int(expected) - len(bins))
    state = accelerator.gradient_state
    ends_step = state.sync_gradients
    *rows, last = split_batch(inputs, bins)
    # Before the step's last micro batch nothing is exchanged anyway. DeepSpeed goes by the state alone.
    with accelerator.no_sync(model) if rows and ends_step else nullcontext():
        state._set_sync_gradients(False)
        for row in rows:
            yield {**row, SUPERVISED: inputs[SUPERVISED]}
    state._set_sync_gradients(ends_step)
    yield {**last, SUPERVISED: inputs[SUPERVISED]}
