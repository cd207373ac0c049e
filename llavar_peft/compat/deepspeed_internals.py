"""The parts of DeepSpeed that have no public counterpart."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_PARTITIONS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
"""Attributes of DeepSpeed's ZeRO optimizers: of stage 3, and of stages 1 and 2."""


def fp32_partitions(optimizer: Any) -> list[Tensor]:
    """Return the flat float32 partitions that this rank's ZeRO optimizer updates.

    Replaces ``deepspeed.utils.safe_get_local_fp32_param`` and its relatives: they work for one parameter at a time,
    for stage 3 only, and cannot set a state that is not a tensor of the parameter's shape (Adam's ``step``), so that a
    resumed run would not be exact. The attributes exist since DeepSpeed 0.9.

    Args:
        optimizer: DeepSpeed's optimizer, which wraps a ``torch.optim.Optimizer``.

    Returns:
        The partitions in the order of the parameter groups; an empty list where DeepSpeed keeps them elsewhere, as it
        does without ZeRO and with offload to disk.
    """
    for attribute in _PARTITIONS:
        found: list[Tensor] = list(getattr(optimizer, attribute, None) or ())
        if found and all(partition.numel() for partition in found):
            return found
    return []
