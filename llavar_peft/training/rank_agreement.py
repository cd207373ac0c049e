"""What the processes of a run have to agree on."""

from __future__ import annotations

import torch


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether something holds on one of the ranks at least; every rank has to ask.

    Args:
        flag: Whether it holds here.
        device: Where this rank trains.

    Returns:
        The same on all ranks.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    value = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return bool(value)


def exit_together() -> None:
    """End the group of processes, where every rank has come to the same end; else one whose threads live on aborts."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
