"""Verification of a delta: it is complete, was made from the given base, and reproduces the target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llavar_peft.errors import WeightsError
from llavar_peft.weights.delta.delta_base_check import check_delta_base, check_matching_tensors, with_head_of
from llavar_peft.weights.delta.delta_files import combine, delta_dtype
from llavar_peft.weights.delta.released_layout import view_as_released
from llavar_peft.weights.io.tensor_blocks import count_not_finite, not_finite_error, read_blocks
from llavar_peft.weights.io.tensor_table import TensorEntry, torch_dtype
from llavar_peft.weights.io.write_weights import Progress

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class DeltaCheck:
    """Result of verifying a valid delta.

    Attributes:
        tensors: Number of tensors.
        elements: Number of elements.
        base: How its base was recognized: ``"fingerprint"`` or ``"statistics"``.
        compared: Whether it was applied and compared with a target.
        differing: Number of elements of the target that are not reproduced exactly, because fp16 is too coarse.
        largest: The largest of these differences.
    """

    tensors: int
    elements: int
    base: str
    compared: bool
    differing: int
    largest: float


def verify_delta(
    base: str | Path, delta: str | Path, *, target: str | Path | None = None, progress: Progress | None = None
) -> DeltaCheck:
    """Read a whole delta and compare it with its base and, if given, the weights it was made of. Write nothing.

    Args:
        base: Folder of the language model that the delta was made from.
        delta: Folder of a delta, as released or of ours.
        target: Folder that base + delta should reproduce.
        progress: Called after each tensor with the number of bytes of the delta read and the total.

    Raises:
        ConfigError: A folder is not of the expected kind.
        WeightsError: The delta has another base or target; tensors do not fit each other, are damaged or not finite.
    """
    old, step = view_as_released(base), view_as_released(delta)
    old = with_head_of(old, step)
    check_matching_tensors(old, step)
    method = check_delta_base(old, step)
    new = view_as_released(target) if target is not None else None
    if new is not None:
        check_matching_tensors(step, new)
    differing, largest, done = 0, 0.0, 0
    total = sum(entry.nbytes for entry in step.table.values())
    for name, entry in step.table.items():
        dtype = delta_dtype(entry.dtype, step.config)
        count, most = _check_tensor(old.table.get(name), entry, None if new is None else new.table[name], dtype)
        differing, largest, done = differing + count, max(largest, most), done + entry.nbytes
        if progress is not None:
            progress(done, total)
    elements = sum(entry.numel for entry in step.table.values())
    return DeltaCheck(len(step.table), elements, method, new is not None, differing, largest)


def _check_tensor(old: TensorEntry | None, step: TensorEntry, new: TensorEntry | None, dtype: str) -> tuple[int, float]:
    base = read_blocks(old) if old is not None else iter(())
    target = read_blocks(new) if new is not None else iter(())
    differing, largest, wrong = 0, 0.0, 0
    for difference, applied in _apply(read_blocks(step), base, dtype):
        if count_not_finite(applied):
            raise not_finite_error(step.name, old, step)
        expected = next(target, None)
        if expected is not None:
            error = (applied.float() - expected.to(applied.dtype).float()).abs()
            differing, largest = differing + int((error > 0).sum()), max(largest, float(error.max()))
            wrong += int((error > _rounding(difference) + _rounding(applied)).sum())
    next(target, None)  # the checksum is compared after the last block
    if wrong and new is not None:
        what = f"{wrong} elements are not reproduced by base + delta (off by up to {largest:.2e}, more than rounding)"
        raise WeightsError.at(new.location, what, "give the weights that the delta was made of")
    return differing, largest


def _apply(step: Iterator[Tensor], base: Iterator[Tensor], dtype: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of a delta, and of the sum."""
    kept: list[Tensor] = []

    def keep() -> Iterator[Tensor]:
        for block in step:
            kept.append(block.to(torch_dtype(dtype), copy=True))
            yield block

    for applied in combine(keep(), base, sign=1, dtype=dtype):
        yield kept.pop(), applied


def _rounding(numbers: Tensor) -> Tensor:
    """Return half a step of the numbers' dtype at each of them: the largest error of rounding to it."""
    import torch

    kind = torch.finfo(numbers.dtype)
    wide = numbers.double()
    _, exponent = torch.frexp(wide)
    # A number of exponent e has steps of 2 ** (e - 1) * eps; subnormal numbers have the smallest one.
    steps = torch.ldexp(torch.full_like(wide, kind.eps / 2), exponent)
    return (steps.clamp(min=kind.tiny * kind.eps) / 2).float()
