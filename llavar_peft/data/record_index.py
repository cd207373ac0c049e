"""Random access to the records of a JSON or JSON Lines file without loading the file.

The offsets of the records are found once and saved next to the file as ``<name>.index``: a header of 64 bytes, then
count + 1 offsets as uint64. File and index are memory-mapped, so that ranks and workers share one copy.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import struct
import tempfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from llavar_peft.errors import DataError, LlavarError
from llavar_peft.text_encodings import detect_unicode, explain_encoding, find_foreign_format, is_legacy
from llavar_peft.text_files import (
    check_is_file,
    decode_unicode,
    explain_json_error,
    json_error_position,
    parse_json,
)

if TYPE_CHECKING:
    import numpy.typing as npt

INDEX_SUFFIX: Final = ".index"
MIN_INDEXED_BYTES: Final = 2**22
"""Smaller files are indexed in memory each time they are opened, which takes 20 ms, and get no index file."""

_MAGIC: Final = b"LLVRIDX1"
# magic, size, mtime_ns, count, CRC of the first and last bytes of the file, CRC of the offsets
_HEADER: Final = struct.Struct("<8sQqQII24x")
_ENDS: Final = 4096
_HEAD: Final = 2**20  # bytes from which the encoding is found
_CONVERTED_BYTES: Final = 2**28  # of a file in UTF-16 or UTF-32, which is converted each time it is opened
_BETWEEN: Final = re.compile(rb"[ \t\r\n]*,[ \t\r\n]*")
_SPACE: Final = b" \t\r\n"
_BOM: Final = b"\xef\xbb\xbf"
_TOKENS: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)
_COUNTED_BYTES: Final = 2**25  # an error beyond this offset is reported without the number of its record


@dataclass(frozen=True, slots=True)
class _Stamp:
    """Properties of a file that change when the file is rewritten."""

    size: int
    mtime_ns: int
    ends: int


class IndexedFile:
    """Records of a ``.json`` file (one array) or a ``.jsonl`` file. Pickles as a path: a worker maps the file again.

    Args:
        path: The file.
        cache_dir: Folder for the index; None for the folder of the file, or the user's cache folder if it is read-only.

    Raises:
        DataError: The file is missing, empty, of another format than its suffix says, or a malformed array.
    """

    def __init__(self, path: str | Path, cache_dir: str | Path | None = None) -> None:
        self.path = Path(path)
        self._cache_dir = None if cache_dir is None else Path(cache_dir)
        self._open()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Any:
        """Return a decoded record. Raises ``DataError`` if it is not valid JSON."""
        start, stop = int(self._offsets[index]), int(self._offsets[index + 1])
        # The last byte of a JSON value is never a comma.
        return parse_json(self._file[start:stop].rstrip(b" \t\r\n,"), self.where(index), self.path, base=start)

    def where(self, index: int) -> str:
        """Return the name of a record, e.g. ``"records.json:17"``, counted from 0."""
        return f"{self.path}:{index}"

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "cache_dir": self._cache_dir, "stamp": self._stamp}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self._cache_dir = state["path"], state["cache_dir"]
        self._open()
        if self._stamp != state["stamp"]:
            raise _fault(
                self.path, "the file changed while it was in use", "run the command again without changing the file"
            )

    def _open(self) -> None:
        check_is_file(self.path, fix="correct the path to the records")
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                if not status.st_size:
                    raise _fault(self.path, "the file is empty", "give a file with records")
                self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise _fault(
                self.path, f"cannot be opened ({error.strerror or error})", "correct the path to the records"
            ) from error
        self._convert()
        ends = zlib.crc32(self._file[-_ENDS:], zlib.crc32(self._file[:_ENDS]))
        self._stamp = _Stamp(status.st_size, status.st_mtime_ns, ends)
        self._offsets = self._find_offsets()

    def _convert(self) -> None:
        """Replace the content by its form in UTF-8, and check that it is text."""
        head = self._file[:_HEAD]
        if detect_unicode(head).encoding == "utf-8":
            fault = find_foreign_format(str(self.path), head)
            if fault is None and is_legacy(head):
                fault = explain_encoding(head, str(self.path), self.path, line=1)
            if fault is not None:
                raise DataError(str(fault), (fault,))
            return
        if len(self._file) > _CONVERTED_BYTES:
            what = f"is too large to be converted from UTF-16 each time (got {len(self._file):,} bytes)"
            raise _fault(self.path, what, "save the file as UTF-8")
        data = decode_unicode(self._file[:], str(self.path), self.path)
        if not data:
            raise _fault(self.path, "the file is empty", "give a file with records")
        self._file = mmap.mmap(-1, len(data))
        self._file.write(data)
        self._file.seek(0)  # where find() begins by default

    def _find_offsets(self) -> npt.NDArray[np.uint64]:
        if self._stamp.size < MIN_INDEXED_BYTES:
            return _scan(self.path, self._file)
        index_paths = _index_paths(self.path, self._cache_dir)
        for index_path in index_paths:
            known = _load(index_path, self._stamp)
            if known is not None:
                return known
        offsets = _scan(self.path, self._file)
        for index_path in index_paths:
            # Without an index file (full disk, read-only folder) the next opening scans the file again.
            with suppress(OSError):
                _save(index_path, self._stamp, offsets)
                break
        return offsets


def _index_paths(path: Path, cache_dir: Path | None) -> list[Path]:
    """Return the paths that an index may have, in order of preference."""
    real = os.path.realpath(path)
    name = f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:16]}-{path.name}{INDEX_SUFFIX}"
    if cache_dir is not None:
        return [cache_dir / name]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [Path(real + INDEX_SUFFIX), home / "llavar_peft" / name]


def _load(index_path: Path, stamp: _Stamp) -> npt.NDArray[np.uint64] | None:
    """Return the memory-mapped offsets if the index is complete and belongs to this version of the file."""
    try:
        with open(index_path, "rb") as file:
            magic, size, mtime_ns, count, ends, check = _HEADER.unpack(file.read(_HEADER.size))
            length = os.fstat(file.fileno()).st_size
        if magic != _MAGIC or _Stamp(size, mtime_ns, ends) != stamp or length != _HEADER.size + 8 * (count + 1):
            return None
        offsets: npt.NDArray[np.uint64] = np.memmap(
            index_path, dtype="<u8", mode="r", offset=_HEADER.size, shape=(count + 1,)
        )
    except (OSError, struct.error, ValueError):
        return None
    return offsets if zlib.crc32(offsets.data) == check else None


def _save(index_path: Path, stamp: _Stamp, offsets: npt.NDArray[np.uint64]) -> None:
    """Write a temporary file and rename it: several ranks may write at once, and none reads a partial index."""
    index_path.parent.mkdir(parents=True, exist_ok=True)
    header = _HEADER.pack(_MAGIC, stamp.size, stamp.mtime_ns, len(offsets) - 1, stamp.ends, zlib.crc32(offsets.data))
    handle, temporary = tempfile.mkstemp(dir=index_path.parent, prefix=f".{index_path.name}.", suffix=".part")
    try:
        with open(handle, "wb") as file:
            file.write(header)
            file.write(offsets.tobytes())
        os.chmod(temporary, 0o644)  # mkstemp makes it readable by its owner only, other users may share the records
        os.replace(temporary, index_path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _scan(path: Path, file: mmap.mmap) -> npt.NDArray[np.uint64]:
    head = file[:_ENDS]
    start = len(_BOM) if head.startswith(_BOM) else 0
    first = head[start:].lstrip(_SPACE)[:1]
    lines = path.suffix.lower() != ".json"
    if lines and first == b"[":
        raise _fault(
            path, "the file starts with '[', expected one JSON object per line", "rename it to .json if it is one array"
        )
    if not lines and first != b"[":
        raise _fault(
            path,
            f"the file starts with {repr(first.decode('latin-1')) if first else 'no text'}, expected '[': one array",
            "rename it to .jsonl if it has one record per line, or put a single record into [ ]"
            if first == b"{"
            else "give a JSON file of records; a web page instead of one means that the download failed",
        )
    return _scan_lines(file, start) if lines else _scan_array(path, file, start)


def _scan_array(path: Path, file: mmap.mmap, start: int) -> npt.NDArray[np.uint64]:
    """Return the offsets of the elements of an array; msgspec checks the syntax without building the elements."""
    with memoryview(file) as whole, whole[start:] as view:
        try:
            elements = msgspec.json.decode(view, type=list[msgspec.Raw])
        except (msgspec.MsgspecError, RecursionError) as error:
            raise _malformed(path, bytes(view), error) from None
        lengths = np.fromiter((len(memoryview(element)) for element in elements), np.int64, len(elements))
        del elements
    offsets = np.empty(len(lengths) + 1, np.dtype("<u8"))
    position = file.find(b"[", start) + 1
    while file[position : position + 1] in (b" ", b"\t", b"\r", b"\n"):
        position += 1
    for index, length in enumerate(lengths.tolist()):
        offsets[index] = position
        position += length
        between = _BETWEEN.match(file, position)
        if between:
            position = between.end()
    offsets[-1] = position
    return offsets


def _scan_lines(file: mmap.mmap, start: int) -> npt.NDArray[np.uint64]:
    """Return the offsets of the lines that are not blank. Their syntax is checked when they are read."""
    step = 2**24  # bytes searched at once
    end = 0x0A if file.find(b"\n") >= 0 else 0x0D  # old programs of the Mac end lines with a carriage return
    breaks = (
        np.flatnonzero(np.frombuffer(file[base : base + step], np.uint8) == end) + base
        for base in range(0, len(file), step)
    )
    starts = np.concatenate([np.array([start], np.int64), *(found + 1 for found in breaks)])
    stops = np.append(starts[1:], len(file))
    blank = stops - starts <= 1
    # A line that starts with white space may be blank; there are few of them.
    bytes_at = np.frombuffer(file, np.uint8)
    suspects = np.flatnonzero(~blank & np.isin(bytes_at[np.minimum(starts, len(file) - 1)], list(_SPACE)))
    del bytes_at
    for line in suspects.tolist():
        blank[line] = not file[int(starts[line]) : int(stops[line])].strip()
    return np.append(starts[~blank], len(file)).astype("<u8")


def _malformed(path: Path, text: bytes, error: Exception) -> LlavarError:
    """Return an error about the syntax of an array, with its position as far as it is known."""
    at = json_error_position(error, text)
    record = ""
    if at is not None and "trailing char" in str(error):
        record = ", after the end of the array"
    elif at is not None and at < _COUNTED_BYTES:
        record = f", record {_count_records(text[:at])}"
    fault = explain_json_error(error, text, str(path), path, line=1, record=record)
    return DataError(str(fault), (fault,))


def _count_records(before: bytes) -> int:
    """Return the index of the record in which the beginning of an array ends."""
    depth, record = 0, 0
    for token in _TOKENS.finditer(before):
        mark = token[0]
        if mark in (b"[", b"{"):
            depth += 1
        elif mark in (b"]", b"}"):
            depth -= 1
        elif mark == b"," and depth == 1:
            record += 1
    return record


def _fault(path: Path, what: str, fix: str) -> LlavarError:
    return DataError.at(str(path), what, fix)
