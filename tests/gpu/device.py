"""The device of the tests in this folder, and the reason why they are skipped where there is none.

``tests/gpu_sim/rehearsal.py`` runs them on the simulated device, with small models, to find what would stop them before
they meet a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

# cuBLAS reads it once; without it two equal runs may differ in their last bits.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE = torch.device(os.environ.get("LLAVAR_GPU_TESTS", "cuda"))
REHEARSED = DEVICE.type != "cuda"
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (REHEARSED or torch.cuda.is_available()), reason="no CUDA device"),
]
GIB = 2**30


def device_module() -> Any:
    """Return the functions of the device: ``torch.cuda``, or those that stand for it."""
    return torch.get_device_module(DEVICE)


@contextmanager
def deterministic() -> Iterator[None]:
    """Choose deterministic kernels where there are any."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 in float32, convolutions too, for which PyTorch's default is TF32."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
