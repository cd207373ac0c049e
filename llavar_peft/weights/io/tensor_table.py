"""The table of tensors in a folder of weights: name, dtype, shape and place in a file, read from headers only.

The libraries decide whether a file is valid: ``safetensors`` checks a header against the size of its file, and
``torch.load(mmap=True, weights_only=True)`` opens a ``.bin``. Everything else reads bytes through the table: blocks of
rows, runs of elements and whole tensors (``tensor_blocks``).
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.errors import DAMAGED, ConfigError, LlavarError, WeightsError, describe_reason
from llavar_peft.types import expand_home

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SAFE_SINGLE = "model.safetensors"
SAFE_INDEX = "model.safetensors.index.json"
BIN_SINGLE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
WEIGHTS_FILES = (SAFE_INDEX, BIN_INDEX, SAFE_SINGLE, BIN_SINGLE)
"""The files that a folder of weights may begin with."""
CHECKSUMS_FILE = "weights_checksums.json"
"""CRC-32 by tensor, for the safetensors files of the same folder. A ``.bin`` holds its checksums itself."""
DOWNLOAD_AGAIN = "download or copy the file again"

_SAFE_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
    "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
SAFE_NAMES = {name: code for code, name in _SAFE_DTYPES.items()}
"""Safetensors' code of each dtype, by torch's name."""
_WRITTEN = ("float16", "bfloat16", "float32")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LONGEST_NAME = 255  # characters of a file's name
_MOST_TENSORS = 50_000
"""LLaVAR-13B has 800, and an adapter for it at most 3,000. A million would take minutes."""
_MOST_PICKLED = 1 << 26
"""Bytes of a ``.bin``'s pickle. That of LLaVAR-13B's largest file, which only names the tensors, has 30 kB."""
_LOCAL_HEADER = 30
"""Bytes of a zip entry's local header before its name."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        name: Its name in the file.
        shape: Its shape.
        dtype: Torch's name of its dtype, e.g. ``"float16"``.
        path: The file.
        offset: Position of its first byte in the file.
        crc32: Checksum of its bytes; None if the file has none.
        data: The tensor itself, if its bytes are not contiguous in the file (torch before 1.6, or a transposed tensor).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    path: Path
    offset: int
    crc32: int | None = None
    data: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.numel * torch_dtype(self.dtype).itemsize

    @property
    def location(self) -> str:
        """File and tensor, for messages."""
        return f"{self.path}:{self.name}"


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of a name, e.g. ``"float16"``."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def check_dtype(dtype: str | None) -> None:
    """Reject a dtype in which weights cannot be written: integers would round them to zero.

    Raises:
        ConfigError: It is none of the three that are supported.
    """
    if dtype not in (None, *_WRITTEN):
        what = f"not a dtype of weights (got {dtype!r}, expected one of {', '.join(_WRITTEN)})"
        raise ConfigError.at("dtype", what, "correct it")


def dtype_name(tensor: TensorEntry | Tensor) -> str:
    """Return torch's name of a tensor's dtype, e.g. ``"float16"``."""
    return str(tensor.dtype).removeprefix("torch.")


def read_tensor_table(source: str | Path, *, checksums: bool = True) -> dict[str, TensorEntry]:
    """Read the table of a folder or a single file.

    Args:
        source: Folder with ``model.safetensors``, ``pytorch_model.bin`` or an index of either (safetensors are
            preferred); or one ``.safetensors`` or ``.bin`` file.
        checksums: Whether to read the checksums that belong to safetensors files.

    Returns:
        The entries by name, file after file in each file's own order.

    Raises:
        WeightsError: No weights, a shard that is missing or truncated, or a tensor of the index that no shard holds.
    """
    files, indexed = _find_shards(expand_home(source))
    found: dict[str, TensorEntry] = {}
    for path in files:
        found.update(read_file_table(path, checksums=checksums))
    missing = [name for name in indexed if name not in found]
    if missing:
        names = ", ".join(missing[:8])
        raise WeightsError.at(str(source), f"no shard holds these tensors of the index: {names}", DOWNLOAD_AGAIN)
    return {name: entry for name, entry in found.items() if not indexed or name in indexed}


def read_file_table(path: Path, *, checksums: bool = True) -> dict[str, TensorEntry]:
    """Read the table of one file, in its own order."""
    if path.suffix != ".safetensors":
        return _read_bin(path)
    entries = _read_safetensors(path)
    return _add_checksums(path, entries) if checksums else entries


def _find_shards(source: Path) -> tuple[list[Path], Mapping[str, Path]]:
    """Return the files of weights, and the file of each tensor if there is an index."""
    if source.is_file():
        return [source], {}
    for name in (SAFE_INDEX, BIN_INDEX):
        if (source / name).is_file():
            indexed = _read_index(source / name)
            return sorted(set(indexed.values())), indexed
    for name in (SAFE_SINGLE, BIN_SINGLE):
        if (source / name).is_file():
            return [source / name], {}
    if (source / "adapter_config.json").is_file():
        raise WeightsError.at(
            str(source),
            "an adapter, expected the weights of a complete model",
            "give its base, or the folder that `llavar-peft merge` wrote",
        )
    expected = f"{SAFE_SINGLE}, {BIN_SINGLE} or an index of either"
    raise WeightsError.at(
        str(source),
        f"no weights found (got {_list_files(source)}, expected {expected})",
        "give the folder that holds the model's weights",
    )


def _list_files(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "an empty folder"


def _read_index(index: Path) -> dict[str, Path]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        indexed = {str(name): index.parent / _shard_name(file) for name, file in files.items()}
        missing = sorted({file.name for file in indexed.values() if not file.is_file()})
    except DAMAGED as error:
        raise WeightsError.at(
            str(index), f"not an index of shards ({describe_reason(error)})", DOWNLOAD_AGAIN
        ) from error
    if missing:
        names = ", ".join(missing[:8]) + (f", and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise WeightsError.at(str(index), f"missing shards: {ascii(names)[1:-1]}", "download the missing shards")
    return indexed


def _shard_name(file: Any) -> str:
    """Return the name of a shard, which must be in the folder of its index; the file itself may be a link."""
    inside = isinstance(file, str) and 0 < len(file) <= _LONGEST_NAME and file.isprintable() and "\\" not in file
    if not inside or Path(file).is_absolute() or ".." in Path(file).parts:
        raise ValueError(f"it names the shard {ascii(file)[:80]}, expected a file in the same folder")
    return str(file)


def _unreadable(path: Path, error: Exception) -> LlavarError:
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as unopened:
        return WeightsError.at(str(path), f"cannot be read ({unopened.strerror})", "check the file's permissions")
    if start == _LFS_POINTER:
        what = "a Git LFS pointer, not the file of weights that it stands for"
        return WeightsError.at(str(path), what, "run `git lfs pull` in the repository, or download the file itself")
    if not start:
        return WeightsError.at(str(path), "the file is empty", DOWNLOAD_AGAIN)
    if "weights_only" in str(error):
        # Torch's message advises to load the file in a way that runs code in it.
        reason = "it is damaged, or contains more than tensors, which is never loaded"
    else:
        reason = describe_reason(error)
    return WeightsError.at(str(path), f"not a readable file of weights ({reason})", DOWNLOAD_AGAIN)


def _read_safetensors(path: Path) -> dict[str, TensorEntry]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt"):
            pass  # checks the header, and that the tensors fill the file exactly
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
    except (SafetensorError, *DAMAGED) as error:
        raise _unreadable(path, error) from error
    header.pop("__metadata__", None)
    if len(header) > _MOST_TENSORS:
        what = f"too many tensors (got {len(header)}, expected at most {_MOST_TENSORS})"
        raise WeightsError.at(str(path), what, "give the weights of a LLaVAR, or an adapter for one")
    entries = {}
    for name, fields in header.items():
        if not isinstance(fields, dict):  # of two entries of one name, the library looks at another one
            raise _unreadable(path, TypeError(f"the entry of {name[:80]!r} is no object"))
        dtype = _SAFE_DTYPES.get(fields["dtype"])
        if dtype is None:
            what = f"unsupported dtype (got {fields['dtype']}, expected one of {', '.join(_SAFE_DTYPES)})"
            raise WeightsError.at(f"{path}:{name}", what, "convert the weights to float16, bfloat16 or float32")
        entries[name] = TensorEntry(name, tuple(fields["shape"]), dtype, path, 8 + length + fields["data_offsets"][0])
    return entries


def _add_checksums(path: Path, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
    stored = path.with_name(CHECKSUMS_FILE)
    if not stored.is_file():
        return entries
    try:
        known = json.loads(stored.read_text(encoding="utf-8"))
        return {name: replace(entry, crc32=int(known[name])) for name, entry in entries.items()}
    except DAMAGED as error:
        raise WeightsError.at(
            str(stored),
            f"not the checksums of {path.name} ({describe_reason(error)})",
            "delete it if you changed the weights yourself",
        ) from error


def _read_bin(path: Path) -> dict[str, TensorEntry]:
    import torch

    try:
        # Torch before 1.6 wrote no zip archives; those cannot be mapped and are loaded.
        records = _zip_records(path) if zipfile.is_zipfile(path) else {}
        tensors = torch.load(path, map_location="cpu", mmap=bool(records), weights_only=True)
    except Exception as error:  # torch raises exceptions of many kinds for damaged files
        raise _unreadable(path, error) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        what = f"not a file of weights (got a {type(tensors).__name__}, expected tensors by name)"
        raise WeightsError.at(str(path), what, "give a file that holds a state dict")
    start = _mapping_address(tensors, records)
    return {name: _bin_entry(path, name, tensor, start, records) for name, tensor in tensors.items()}


def _zip_records(path: Path) -> dict[int, tuple[int, int]]:
    """Return CRC-32 and size of each stored tensor, by the offset of its bytes in the file.

    Raises:
        ValueError: The archive is none that torch writes.
    """
    found = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            # Torch stores everything as it is. A compressed part can be a thousand times as large in memory.
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > path.stat().st_size:
                raise ValueError("a part of it is compressed, which torch never does")
            if info.filename.endswith("/data.pkl") and info.file_size > _MOST_PICKLED:
                raise ValueError(f"its list of tensors has {info.file_size} bytes, expected at most {_MOST_PICKLED}")
            if "/data/" in info.filename and info.file_size:
                file.seek(info.header_offset)
                name, extra = struct.unpack("<HH", file.read(_LOCAL_HEADER)[26:30])
                found[info.header_offset + _LOCAL_HEADER + name + extra] = (info.CRC, info.file_size)
    return found


def _mapping_address(tensors: Mapping[str, Tensor], records: Mapping[int, tuple[int, int]]) -> int | None:
    """Return where in memory torch mapped the file, so that addresses give offsets; None if it is not mapped."""
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    addresses = {storage.data_ptr() for storage in storages if storage.nbytes()}
    if not addresses or not records:
        return None
    start = min(addresses) - min(records)
    return start if all(address - start in records for address in addresses) else None


def _bin_entry(
    path: Path, name: str, tensor: Tensor, start: int | None, records: Mapping[int, tuple[int, int]]
) -> TensorEntry:
    shape, dtype = tuple(tensor.shape), dtype_name(tensor)
    if start is None or not tensor.is_contiguous() or not tensor.numel():
        return TensorEntry(name, shape, dtype, path, 0, data=tensor.contiguous())
    entry = TensorEntry(name, shape, dtype, path, tensor.data_ptr() - start)
    crc, size = records.get(entry.offset, (0, 0))
    # torch.save can be told to leave checksums out; it then writes zero.
    return replace(entry, crc32=crc) if crc and size == entry.nbytes else entry
