"""What tensors a folder of weights holds, and where their bytes lie; the tensors themselves stay on disk.

``read_tensor_table`` reads headers only: those of safetensors, and for ``.bin`` what ``torch.load`` reports without
reading data (``weights_only=True``). ``blocks`` then reads the bytes.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.errors import WeightsError
from llavar_peft.weights.io.open_weights import find_shards, unreadable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FETCH = "fetch the file again"
CHECKSUMS_FILE = "weights_checksums.json"
"""Beside safetensors that this package wrote: CRC-32 by tensor. A ``.bin`` has them inside."""
_SAFE_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
SAFE_NAMES = {name: code for code, name in _SAFE_DTYPES.items()}
"""Safetensors' code of each dtype, by torch's name."""
_LOCAL_HEADER = 30
"""Bytes of a zip entry's local header before its name."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        name: Its name in the file.
        shape: Its shape.
        dtype: Torch's name of its dtype, e.g. ``"float16"``.
        path: The file.
        offset: Of its first byte in the file.
        crc32: Of its bytes, where the file says.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: Path
    offset: int
    crc32: int | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.numel * torch_dtype(self.dtype).itemsize


def torch_dtype(name: str) -> torch.dtype:
    """Torch's dtype of a name, e.g. ``"float16"``."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def read_tensor_table(source: str | Path) -> dict[str, TensorEntry]:
    """Read which tensors a folder (or one file) holds, and where.

    Args:
        source: Folder with ``model.safetensors``, ``pytorch_model.bin`` or an index of either; or one such file.

    Returns:
        The entries by name, file after file in each file's own order.

    Raises:
        WeightsError: No weights, a shard missing or cut off, a tensor of the index that its shard does not hold.
    """
    shards = find_shards(source)
    found: dict[str, TensorEntry] = {}
    for path in dict.fromkeys(shards.files):
        found.update(read_file_tensor_table(path))
    absent = [name for name in shards.names if name not in found]
    if absent:
        raise WeightsError.at(
            str(source), f"the index names tensors that the shards do not hold: {', '.join(absent[:8])}", FETCH
        )
    return {name: entry for name, entry in found.items() if not shards.names or name in shards.names}


def read_file_tensor_table(path: Path) -> dict[str, TensorEntry]:
    """The entries of one file, in its order."""
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_bin(path)


def _read_safetensors(path: Path) -> dict[str, TensorEntry]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise WeightsError.at(str(path), f"cut off in its header (got {size} bytes)", FETCH)
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {name: _safe_entry(path, name, fields, 8 + length) for name, fields in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise unreadable(path, error) from error
    _add_checksums(path, entries)
    end = max((entry.offset + entry.nbytes for entry in entries.values()), default=8 + length)
    if end != size:
        raise WeightsError.at(str(path), f"not as long as its header says (got {size} bytes, expected {end})", FETCH)
    return entries


def _add_checksums(path: Path, entries: dict[str, TensorEntry]) -> None:
    beside = path.with_name(CHECKSUMS_FILE)
    if not beside.is_file():
        return
    try:
        known = json.loads(beside.read_text(encoding="utf-8"))
        entries.update({name: replace(entry, crc32=int(known[name])) for name, entry in entries.items()})
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError.at(
            str(beside),
            f"not the checksums of {path.name} ({error!r})",
            "remove it if the weights were changed on purpose",
        ) from error


def _safe_entry(path: Path, name: str, fields: Mapping[str, Any], data: int) -> TensorEntry:
    begin, end = (int(place) for place in fields["data_offsets"])
    shape = tuple(int(size) for size in fields["shape"])
    entry = TensorEntry(name, shape, _SAFE_DTYPES[fields["dtype"]], path, data + begin)
    if entry.nbytes != end - begin or begin < 0:
        raise ValueError(f"{name} has {end - begin} bytes, its shape asks for {entry.nbytes}")
    return entry


def _read_bin(path: Path) -> dict[str, TensorEntry]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not zipfile.is_zipfile(path):
        raise WeightsError.at(
            str(path),
            "no zip archive: cut off, or written by torch before 1.6",
            "fetch the file again, or load it with torch and save it again",
        )
    try:
        crcs = _zip_crcs(path)
        with FakeTensorMode():  # gives the layout without reading the data
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch lets through whatever the bytes provoke
        raise unreadable(path, error) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise WeightsError.at(
            str(path), f"holds a {type(tensors).__name__}, expected a table of tensors", "give a file of weights"
        )
    return {name: _bin_entry(path, name, tensor, crcs) for name, tensor in tensors.items()}


def _bin_entry(path: Path, name: str, tensor: Tensor, crcs: Mapping[int, tuple[int, int]]) -> TensorEntry:
    if not tensor.is_contiguous():
        raise WeightsError.at(f"{path}:{name}", "not contiguous", "load it with torch, make it contiguous, save it")
    storage: Any = tensor.untyped_storage()
    start = int(storage._checkpoint_offset)
    offset = start + int(tensor.storage_offset()) * tensor.element_size()
    entry = TensorEntry(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), path, offset)
    crc, size = crcs.get(start, (0, 0))
    # Zero stands for "not computed": torch.save can be told to leave sums out.
    whole = crc != 0 and offset == start and size == entry.nbytes
    return TensorEntry(name, entry.shape, entry.dtype, path, offset, crc) if whole else entry


def _zip_crcs(path: Path) -> dict[int, tuple[int, int]]:
    """CRC-32 and size of each entry by the offset of its data."""
    found = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset)
            header = file.read(_LOCAL_HEADER)
            name, extra = struct.unpack("<HH", header[26:30])
            found[info.header_offset + _LOCAL_HEADER + name + extra] = (info.CRC, info.file_size)
    return found
