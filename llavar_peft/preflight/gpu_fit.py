"""The smallest common GPU that has enough memory."""

from __future__ import annotations

from collections.abc import Iterable

from llavar_peft.preflight.estimate_stage import estimate_stage
from llavar_peft.recipe.schema import ModelConfig, Stage

CUDA_BYTES = 2**30
"""Memory of CUDA's context and libraries, which PyTorch does not count."""
GPU_SIZES = (8, 12, 16, 24, 40, 80)
"""Memory of common GPUs in GiB, such as an RTX 4060, 3060, 4080 and 4090, and an A100 of 40 and of 80 GB."""
_MANY = 8
_SPARE = 1.05
"""Room for the allocator's unused parts, and for the estimate's error (3.5 % at most in tests/gpu_sim)."""


def smallest_gpu(peaks: Iterable[int], gpus: int = 1) -> str | None:
    """Return the smallest common size of GPU for some peaks of memory, such as ``24 GB`` or ``8 x 24 GB``.

    Args:
        peaks: Bytes on one GPU.
        gpus: Number of GPUs.

    Returns:
        None if the largest GPU is too small.
    """
    needed = max(peaks) * _SPARE + CUDA_BYTES
    size = next((size for size in GPU_SIZES if needed <= size * 2**30), None)
    return None if size is None else f"{gpus} x {size} GB" if gpus > 1 else f"{size} GB"


def fit_gpus(model: ModelConfig, stages: Iterable[Stage]) -> tuple[str | None, dict[str, int]]:
    """Return the GPU on which all stages fit, or eight of them, and each stage's peak there in bytes."""
    chosen = tuple(stages)
    for gpus in (1, _MANY):
        peaks = {stage.name: estimate_stage(model, stage, gpus=gpus).memory.peak for stage in chosen}
        found = smallest_gpu(peaks.values(), gpus)
        if found is not None:
            break
    return found, peaks
