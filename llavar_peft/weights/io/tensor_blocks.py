"""Tensors read from disk a block of rows at a time, so that their size does not matter."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.errors import Fault, WeightsError
from llavar_peft.weights.io.tensor_table import FETCH, TensorEntry, torch_dtype

if TYPE_CHECKING:
    from io import FileIO

    from torch import Tensor

BLOCK = 1 << 20
"""Elements of a block, about: a block is a number of whole rows."""


def rows_per_block(shape: tuple[int, ...]) -> int:
    """How many rows of a tensor make a block: the same for equal rows, whatever their number and dtype."""
    return max(1, BLOCK // max(1, math.prod(shape[1:])))


def read_blocks(entry: TensorEntry) -> Iterator[Tensor]:
    """Read a tensor from its first row to its last.

    Args:
        entry: Where it lies.

    Yields:
        Blocks of rows, each in memory of its own: shape (rows, ...); (1,) for a single number.

    Raises:
        WeightsError: The file ends early; or, after the last block, its bytes are not those that its checksum was
            taken of. What was yielded is then not to be used.
    """
    import torch

    shape = entry.shape or (1,)
    step = rows_per_block(shape)
    checksum = 0
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        for start in range(0, shape[0], step):
            block = torch.empty((min(step, shape[0] - start), *shape[1:]), dtype=torch_dtype(entry.dtype))
            _fill(file, block, entry)
            if entry.crc32 is not None:
                checksum = zlib.crc32(tensor_bytes(block), checksum)
            yield block
    if entry.crc32 is not None and checksum != entry.crc32:
        raise WeightsError.at(f"{entry.path}:{entry.name}", "damaged: its checksum differs", FETCH)


def read_elements(entry: TensorEntry, start: int, count: int) -> Tensor:
    """Read a run of elements, unchecked.

    Args:
        entry: Where the tensor lies.
        start: First element, in the order of the bytes.
        count: How many.

    Returns:
        Shape (count,).

    Raises:
        WeightsError: The file ends early.
    """
    import torch

    part = torch.empty(count, dtype=torch_dtype(entry.dtype))
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset + start * part.itemsize)
        _fill(file, part, entry)
    return part


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    import torch

    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def first_not_finite(blocks: Iterable[Tensor], where: str) -> Fault | None:
    """Look for NaN and infinity.

    Args:
        blocks: Of one tensor.
        where: File and tensor, for the message.

    Returns:
        A fault that says how many there are; None where there are none.
    """
    count = total = 0
    for block in blocks:
        count += count_not_finite(block)
        total += block.numel()
    if count == 0:
        return None
    return Fault(where, f"{count} of {total} numbers are NaN or infinite", "use undamaged weights")


def count_not_finite(tensor: Tensor) -> int:
    """How many numbers of a tensor are NaN or infinite."""
    import torch

    # Least and greatest are NaN or infinite where any number is, and take a tenth of the time of counting.
    if tensor.numel() == 0 or all(math.isfinite(float(end)) for end in tensor.aminmax()):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def _fill(file: FileIO, tensor: Tensor, entry: TensorEntry) -> None:
    view = tensor_bytes(tensor)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise WeightsError.at(f"{entry.path}:{entry.name}", "the file ends within this tensor", FETCH)
        done += count


def tensor_location(entry: TensorEntry) -> str:
    """How messages call a tensor."""
    return f"{Path(entry.path)}:{entry.name}"


def locate_fault(name: str, *entries: TensorEntry | None) -> WeightsError:
    """The error for a result that is not finite: which file holds such numbers, or that fp16 is too small.

    Args:
        name: The tensor.
        *entries: What it was made from.

    Returns:
        The error, to be raised.
    """
    for entry in entries:
        fault = first_not_finite(read_blocks(entry), tensor_location(entry)) if entry is not None else None
        if fault is not None:
            return WeightsError(str(fault), (fault,))
    where = " and ".join(tensor_location(entry) for entry in entries if entry is not None)
    fault = Fault(where, f"{name} comes out too large for fp16", "use weights that belong together")
    return WeightsError(str(fault), (fault,))
