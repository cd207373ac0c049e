"""The memory tracker counts what PyTorch's own tracker counts."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.checkpoint import checkpoint

from llavar_peft.compat.memory_tracker import MemoryTracker


class _Recomputing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=False)
        return hidden


def _train(model: nn.Module, *, fused: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused, foreach=not fused)
    model(torch.zeros(500, 64)).square().sum().backward()  # PyTorch's tracker does not support a second step
    optimizer.step()


def test_peaks_equal_those_of_pytorchs_tracker() -> None:
    for fused in (False, True):
        with FakeTensorMode():
            with MemoryTracker() as ours:
                _train(_Recomputing(), fused=fused)
            with MemTracker() as theirs:
                _train(_Recomputing(), fused=fused)
        expected = theirs.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
        assert ours.peak == expected


def test_a_storage_counts_once_and_until_its_last_tensor_is_released() -> None:
    with FakeTensorMode(), MemoryTracker() as tracker:
        whole = torch.empty(1000)
        part = whole[:10].view(2, 5)
        assert tracker.now == 4000
        del whole
        assert tracker.now == 4000
        part.untyped_storage().resize_(0)  # as FSDP frees a gathered parameter
        assert tracker.now == 0
        part.untyped_storage().resize_(4000)
        del part
        assert (tracker.now, tracker.peak) == (0, 4000)
        assert tracker.reset_peak() == 4000
        assert tracker.peak == 0
