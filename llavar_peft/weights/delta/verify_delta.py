"""Whether a delta is whole, was taken from a base, and gives a target back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llavar_peft.errors import Fault, WeightsError
from llavar_peft.weights.base_check import check_base, check_pair
from llavar_peft.weights.delta.delta_files import combined
from llavar_peft.weights.delta.released_layout import ReleasedView, view_as_released
from llavar_peft.weights.io.stream_tensors import Progress
from llavar_peft.weights.io.tensor_blocks import count_not_finite, locate_fault, read_blocks, tensor_location
from llavar_peft.weights.io.tensor_table import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class DeltaCheck:
    """What was found of a delta that is sound.

    Attributes:
        tensors: How many.
        elements: Their numbers.
        base: How its base was told: ``"fingerprint"`` or ``"statistics"``.
        compared: Whether it was applied and held against a target.
        differing: Numbers of the target that do not come back exactly, for want of digits in fp16.
        largest: By how much at most.
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
    """Read a delta through, against its base and, if given, the weights it was made of. Writes nothing.

    Args:
        base: Folder of the LLaMA or Vicuna that the delta was taken from.
        delta: Folder of a delta, as released or of ours.
        target: Folder that base + delta should give.
        progress: Told after each tensor how many bytes of the delta are read, and of how many.

    Returns:
        What was found.

    Raises:
        ConfigError: A folder that is not what it should be.
        WeightsError: Another base or another target than the delta's; tensors that do not fit each other, damaged or
            not finite.
    """
    old, step = view_as_released(base), view_as_released(delta)
    check_pair(old, step)
    told = check_base(old, step)
    new = view_as_released(target) if target is not None else None
    if new is not None:
        check_pair(step, new)
    differing, largest, done = 0, 0.0, 0
    total = sum(entry.nbytes for entry in step.table.values())
    for name, entry in step.table.items():
        count, most = _check_tensor(old.table.get(name), entry, _entry_of(new, name))
        differing, largest, done = differing + count, max(largest, most), done + entry.nbytes
        if progress is not None:
            progress(done, total)
    elements = sum(entry.numel for entry in step.table.values())
    return DeltaCheck(len(step.table), elements, told, new is not None, differing, largest)


def _entry_of(view: ReleasedView | None, name: str) -> TensorEntry | None:
    return None if view is None else view.table[name]


def _check_tensor(old: TensorEntry | None, step: TensorEntry, new: TensorEntry | None) -> tuple[int, float]:
    base = read_blocks(old) if old is not None else iter(())
    target = read_blocks(new) if new is not None else iter(())
    differing, largest, far = 0, 0.0, 0
    for difference, applied in _applied(read_blocks(step), base):
        if count_not_finite(applied):
            raise locate_fault(step.name, old, step)
        expected = next(target, None)
        if expected is not None:
            error = (applied.float() - expected.half().float()).abs()
            differing, largest = differing + int((error > 0).sum()), max(largest, float(error.max()))
            far += int((error > _rounding(difference) + _rounding(applied)).sum())
    next(target, None)  # its checksum is looked at after the last block
    if far and new is not None:
        what = f"{far} numbers do not come back, and rounding does not explain it (off by up to {largest:.2e})"
        fault = Fault(tensor_location(new), what, "give the weights that the delta was made of")
        raise WeightsError(str(fault), (fault,))
    return differing, largest


def _applied(step: Iterator[Tensor], base: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of a delta, and of the sum."""
    kept: list[Tensor] = []

    def keep() -> Iterator[Tensor]:
        for block in step:
            kept.append(block.half().clone())
            yield block

    for applied in combined(keep(), base, sign=1):
        yield kept.pop(), applied


def _rounding(numbers: Tensor) -> Tensor:
    """Half a step of fp16 at each number: how far rounding to it can have moved it."""
    import torch

    wide = numbers.float()
    _, exponent = torch.frexp(wide)
    return torch.ldexp(torch.ones_like(wide), (exponent - 12).clamp(min=-25))
