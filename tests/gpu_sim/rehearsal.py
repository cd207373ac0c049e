"""Run what needs a GPU on the simulated device: its tests, and a cell of its benchmark.

It shows that they run to their end, and on which device their tensors are; not that their tolerances hold on a GPU.
Where they would ask CUDA, they are told that the simulated device is the GPU, has bfloat16 arithmetic, and runs the
kernels of ``varlen_attn`` and Liger, which are PyTorch definitions.

``python -m tests.gpu_sim.rehearsal [ARGUMENTS OF PYTEST]`` runs all of the tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.gpu_sim import library_support, simulated_device

ROOT = Path(__file__).parents[2]


class Outcomes:
    """A plugin of pytest that records the outcome of each test, by its name, and why it was skipped."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.rpartition("/")[2]
        if report.when == "call" or not report.passed:
            reason = f": {report.longrepr[2]}" if isinstance(report.longrepr, tuple) else ""
            self.found[name] = f"{report.outcome}{reason}"


def run_tests(arguments: list[str]) -> dict[str, str]:
    """Run the tests that need a GPU in this process, in which the device is installed, and return their outcomes.

    Args:
        arguments: For pytest, such as ``["-k", "memory"]``.
    """
    outcomes = Outcomes()
    with patch.dict(os.environ, {"LLAVAR_GPU_TESTS": simulated_device.DEVICE}), _stand_ins():
        pytest.main([str(ROOT / "tests/gpu"), "-q", "-p", "no:cacheprovider", *arguments], plugins=[outcomes])
    return outcomes.found


def measure_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Return what the GPU's benchmark of training measures in a cell."""
    with patch.object(sys, "path", [str(ROOT / "benchmarks/gpu"), str(ROOT / "benchmarks"), *sys.path]):
        from train_cell import measure

        found: dict[str, Any] = measure(cell, torch.device(simulated_device.DEVICE))
    return found


@contextmanager
def _stand_ins() -> Iterator[None]:
    from llavar_peft.models import build_model, layer_kernels, packed_attention
    from llavar_peft.training import launch
    from tests.flash_attention import varlen_kernels
    from tests.models.test_layer_kernels import liger_modules

    with (
        patch.object(build_model, "claim_device", lambda: torch.device(simulated_device.DEVICE)),
        patch.object(build_model, "half_precision", lambda: torch.bfloat16),
        patch.object(launch, "half_precision", lambda: torch.bfloat16),
        patch.object(build_model, "check_kernels", lambda *_: None),
        patch.object(layer_kernels, "check_kernels", lambda *_: None),
        patch.object(packed_attention, "_has_kernel", lambda _: True),
        varlen_kernels(),
    ):
        sys.modules.update(liger_modules())  # not by ``patch.dict``, which also removes what is imported meanwhile
        try:
            yield
        finally:
            for name in liger_modules():
                del sys.modules[name]


def main(arguments: list[str]) -> int:
    """Install the device, run the tests, and return 1 if one of them failed."""
    library_support.announce_device()
    simulated_device.install()
    library_support.support_half_precision()
    library_support.support_4_bits()
    with simulated_device.simulated_gpu():
        outcomes = run_tests(arguments)
    return int(not outcomes or "failed" in outcomes.values())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
