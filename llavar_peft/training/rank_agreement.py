"""Agreement between the processes of a run."""

from __future__ import annotations

import torch


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on at least one rank. Every rank must call this.

    Args:
        flag: The flag of this rank.
        device: The device of this rank.

    Returns:
        The same value on all ranks.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    value = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return bool(value)


def exit_together() -> None:
    """Destroy the process group at the end of every rank; otherwise a rank whose threads still run aborts."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
