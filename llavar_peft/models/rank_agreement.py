"""Agreement between the processes of a run."""

from __future__ import annotations

from datetime import timedelta
from functools import lru_cache

import torch


def is_distributed() -> bool:
    """Return whether this process belongs to a group of processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def on_any_rank(flag: bool) -> bool:
    """Return whether the flag is set on at least one rank. Every rank must call this."""
    return bool(largest_of_ranks(int(flag)))


def largest_of_ranks(value: int) -> int:
    """Return the largest of the ranks' values. Every rank must call this; no rank waits for its device."""
    if not is_distributed():
        return value
    largest = torch.tensor(value)
    torch.distributed.all_reduce(
        largest, op=torch.distributed.ReduceOp.MAX, group=_host_group(torch.distributed.group.WORLD)
    )
    return int(largest)


@lru_cache(maxsize=1)
def _host_group(world: torch.distributed.ProcessGroup) -> torch.distributed.ProcessGroup:
    """Return a process group of all ranks that exchanges CPU tensors: the given one, if it can, or a new one."""
    if "gloo" in torch.distributed.get_backend_config(world) or "mpi" in torch.distributed.get_backend_config(world):
        return world
    # A rank may write a large checkpoint while the others wait. One that has died ends the wait at once.
    made: torch.distributed.ProcessGroup = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))
    return made


def exit_together() -> None:
    """Destroy the process group at the end of every rank; otherwise a rank whose threads still run aborts."""
    if is_distributed():
        torch.distributed.destroy_process_group()
