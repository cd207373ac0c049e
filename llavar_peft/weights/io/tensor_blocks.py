"""The bytes of tensors on disk: blocks of rows, runs of elements and whole tensors, and checks of their values."""

from __future__ import annotations

import math
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.atomic_files import write_json
from llavar_peft.errors import Fault, WeightsError
from llavar_peft.weights.io.joined_rows import JoinedRows
from llavar_peft.weights.io.tensor_table import (
    CHECKSUMS_FILE,
    DOWNLOAD_AGAIN,
    TensorEntry,
    read_file_table,
    read_tensor_table,
    torch_dtype,
)

if TYPE_CHECKING:
    from io import FileIO

    from torch import Tensor

BLOCK_ELEMENTS = 1 << 20
"""Approximate number of elements of a block, which consists of whole rows."""
_SHOWN = 8
_LONGEST_NAME = 200  # characters
_FAULTS_SHOWN = 20
_READERS = 8
"""Threads that read; more than a disk serves well."""


def rows_per_block(shape: tuple[int, ...]) -> int:
    """Return the number of rows of a block. It depends on the size of a row only."""
    return max(1, BLOCK_ELEMENTS // max(1, math.prod(shape[1:])))


def read_blocks(entry: TensorEntry) -> Iterator[Tensor]:
    """Read a tensor from its first row to its last.

    Yields:
        Blocks of shape (rows, ...) that the caller may modify; (1,) for a scalar.

    Raises:
        WeightsError: The file ends early; or, after the last block, the checksum differs. What was yielded must then
            not be used.
    """
    import torch

    shape = entry.shape or (1,)
    step = rows_per_block(shape)
    if entry.data is not None:
        for start in range(0, shape[0], step):
            yield entry.data.reshape(shape)[start : start + step].clone()
        return
    checksum = 0
    with entry.path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        if hasattr(os, "posix_fadvise"):  # the disk reads the next blocks while these are used
            os.posix_fadvise(file.fileno(), entry.offset, entry.nbytes, os.POSIX_FADV_WILLNEED)
        for start in range(0, shape[0], step):
            block = torch.empty((min(step, shape[0] - start), *shape[1:]), dtype=torch_dtype(entry.dtype))
            _fill(file, block, entry)
            if entry.crc32 is not None:
                checksum = zlib.crc32(tensor_bytes(block), checksum)
            yield block
    if entry.crc32 is not None and checksum != entry.crc32:
        what = f"damaged: wrong checksum (got {checksum:08x}, expected {entry.crc32:08x})"
        raise WeightsError.at(entry.location, what, DOWNLOAD_AGAIN)


def read_elements(entry: TensorEntry, start: int, count: int) -> Tensor:
    """Read a run of elements without checking the checksum.

    Args:
        entry: The tensor.
        start: First element, in the order of the file.
        count: Number of elements.

    Returns:
        Shape (count,).

    Raises:
        WeightsError: The file ends early.
    """
    return read_runs(entry, [(start, count)])


def read_runs(entry: TensorEntry, runs: Sequence[tuple[int, int]]) -> Tensor:
    """Read several runs of elements, each given by its start and length, into one tensor, as ``read_elements``."""
    import torch

    if entry.data is not None:
        return torch.cat([entry.data.reshape(-1)[start : start + count] for start, count in runs])
    parts = torch.empty(sum(count for _, count in runs), dtype=torch_dtype(entry.dtype))
    done = 0
    with entry.path.open("rb", buffering=0) as file:
        for start, count in runs:
            file.seek(entry.offset + start * parts.itemsize)
            _fill(file, parts[done : done + count], entry)
            done += count
    return parts


def read_tensor(entry: TensorEntry) -> Tensor:
    """Read a whole tensor.

    Raises:
        WeightsError: The file ends early, or the checksum differs.
    """
    import torch

    blocks = list(read_blocks(entry))
    return (torch.cat(blocks) if blocks else torch.empty(0)).reshape(entry.shape)


def _fill(file: FileIO, tensor: Tensor, entry: TensorEntry) -> None:
    view = tensor_bytes(tensor)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise WeightsError.at(entry.location, "the file ends within this tensor", DOWNLOAD_AGAIN)
        done += count


class WeightsStore(Mapping[str, "Tensor"]):
    """Whole tensors by name, mapped from their files: memory is used for what is read from them."""

    def __init__(self, table: Mapping[str, TensorEntry]) -> None:
        self._table = dict(table)
        self._mapped: dict[Path, mmap.mmap] = {}

    def __getitem__(self, name: str) -> Tensor:
        import torch

        entry = self._table[name]
        if entry.data is not None:
            return entry.data
        if not entry.numel:
            return torch.empty(entry.shape, dtype=torch_dtype(entry.dtype))
        if entry.path not in self._mapped:
            with entry.path.open("rb") as file:  # a private copy: writing to a tensor leaves the file as it is
                self._mapped[entry.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        whole: Any = self._mapped[entry.path]
        # Reading behind the end of a file that was truncated after it was mapped ends the process (SIGBUS).
        if self._mapped[entry.path].size() < entry.offset + entry.nbytes:
            raise WeightsError.at(entry.location, "the file was truncated while it was in use", DOWNLOAD_AGAIN)
        dtype = torch_dtype(entry.dtype)
        return torch.frombuffer(whole, dtype=dtype, count=entry.numel, offset=entry.offset).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


def open_weights(source: str | Path) -> WeightsStore:
    """Open the weights of a folder or of a single file, without reading them and without checking checksums.

    Args:
        source: As for ``read_tensor_table``.

    Raises:
        WeightsError: No weights, a shard that is missing or truncated, or a tensor of the index that no shard holds.
    """
    return WeightsStore(read_tensor_table(source, checksums=False))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    import torch

    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def write_checksums(folder: Path) -> None:
    """Write the CRC-32 of each tensor of a new folder of safetensors, which have no checksums of their own."""
    (folder / CHECKSUMS_FILE).unlink(missing_ok=True)
    sums: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in read_file_table(path).items():
            sums[name] = 0
            for block in read_blocks(entry):
                sums[name] = zlib.crc32(tensor_bytes(block), sums[name])
    write_json(folder / CHECKSUMS_FILE, sums)


def count_not_finite(tensor: Tensor) -> int:
    """Return the number of NaN and infinite elements."""
    import torch

    if not tensor.is_floating_point():
        return 0
    if tensor.itemsize == 1:  # 8-bit floats have no minimum
        tensor = tensor.float()
    # The minimum and maximum are NaN or infinite if any element is, and take a tenth of the time of counting.
    if tensor.numel() == 0 or all(math.isfinite(float(end)) for end in tensor.aminmax()):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def find_not_finite(blocks: Iterable[Tensor], where: str) -> Fault | None:
    """Return a fault if the blocks of a tensor hold NaN or infinite elements.

    Args:
        blocks: Of one tensor.
        where: File and tensor, for the message.
    """
    count = total = 0
    for block in blocks:
        count += count_not_finite(block)
        total += block.numel()
    if count == 0:
        return None
    return Fault(where, f"{count} of {total} elements are NaN or infinite", "use undamaged weights")


def check_values(table: Mapping[str, TensorEntry]) -> None:
    """Read tensors once, several at the same time, and reject damage: a wrong checksum, NaN or infinite elements.

    A core reads about 1 GB a second with a checksum, and 3 GB without.

    Raises:
        WeightsError: Names the first damaged tensors.
    """
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as pool:
        found = [fault for faults in pool.map(find_damage, table.values()) for fault in faults]
    raise_faults(found[:_SHOWN])


def find_damage(entry: TensorEntry) -> list[Fault]:
    """Read a tensor, and return a fault if its checksum is wrong or elements are NaN or infinite."""
    try:
        fault = find_not_finite(read_blocks(entry), entry.location)
    except WeightsError as error:
        return list(error.faults)
    return [] if fault is None else [fault]


def not_finite_error(
    name: str,
    *sources: TensorEntry | Tensor | None,
    fix: str = "use weights that belong together, or a wider dtype",
) -> WeightsError:
    """Return the error for a result with NaN or infinite elements: an input has them too, or the dtype overflows.

    Args:
        name: Name of the result.
        *sources: The tensors it was computed from.
        fix: What to do about a dtype that overflows.
    """
    places = []
    for source in sources:
        if source is not None:
            places.append(source.location if isinstance(source, TensorEntry) else name)
            blocks = read_blocks(source) if isinstance(source, TensorEntry) else [source]
            fault = find_not_finite(blocks, places[-1])
            if fault is not None:
                return WeightsError(str(fault), (fault,))
    fault = Fault(" and ".join(places) or name, f"{name} exceeds the range of the result's dtype", fix)
    return WeightsError(str(fault), (fault,))


def check_tensors(
    tensors: Mapping[str, Tensor] | Mapping[str, Tensor | JoinedRows],
    expected: Mapping[str, tuple[int, ...]],
    *,
    where: str,
    subset: bool = False,
) -> None:
    """Reject tensors whose names or shapes are not those of a model.

    Args:
        tensors: Tensors by our names.
        expected: Shapes by our names.
        where: File or folder, for the message.
        subset: Whether tensors may be missing.

    Raises:
        WeightsError: Names every missing, unexpected or misshapen tensor (the first eight of each).
    """
    missing = [] if subset else [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    misshapen = [
        f"{name} (got {list(tensor.shape)}, expected {list(expected[name])})"
        for name, tensor in tensors.items()
        if name in expected and tuple(tensor.shape) != tuple(expected[name])
    ]
    fix = "use the complete weights of this model, with the configuration they were saved with"
    faults = [
        Fault(where, f"{len(found)} {kind}: {join_first(found, _SHOWN)}", fix)
        for kind, found in (
            ("tensors missing", missing),
            ("unexpected tensors", unexpected),
            ("tensors of another shape", misshapen),
        )
        if found
    ]
    raise_faults(faults)


def raise_faults(faults: list[Fault]) -> None:
    """Raise one error for all faults, whose message has the first of them; do nothing if there are none."""
    if faults:
        more = [f"and {len(faults) - _FAULTS_SHOWN} more problems of this kind"] * (len(faults) > _FAULTS_SHOWN)
        raise WeightsError("\n".join([*map(str, faults[:_FAULTS_SHOWN]), *more]), faults)


def join_first(found: list[str], shown: int = 6) -> str:
    """Join the first few of a list, without the ends of very long ones, and say how many more there are."""
    short = [one if len(one) <= _LONGEST_NAME else f"{one[:_LONGEST_NAME]}..." for one in found[:shown]]
    return ", ".join(short) + (f", and {len(found) - shown} more" if len(found) > shown else "")
