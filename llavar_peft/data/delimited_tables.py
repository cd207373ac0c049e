"""Records in CSV and TSV files, converted once to a memory-mapped Arrow file of texts.

Python's csv module reads the file, and every cell stays the text that it is: what guesses types makes 7 of 007, and
nothing of a sign that says NA. Empty cells are null. A file whose rows do not fit its header is rejected as a whole,
because an open quote may have moved the ends of all rows after it.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from llavar_peft.data.question_records import NAMES
from llavar_peft.data.record_stream import store_batches
from llavar_peft.errors import DataError, Fault, LlavarError
from llavar_peft.text_encodings import (
    UnicodeForm,
    detect_unicode,
    explain_encoding,
    find_foreign_format,
    first_undecodable,
)
from llavar_peft.text_files import check_is_file

SUFFIXES: Final = (".csv", ".tsv")
_FORMAT: Final = "csv-1"  # of the Arrow file; a change reads the files again
_DELIMITERS: Final = (",", ";", "\t", "|")
_NAMED_DELIMITER: Final = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)
"""The first line that Excel writes and reads, which is not a part of the table."""
_HEAD: Final = 2**16  # characters, or bytes, in which the header ends
_LONGEST: Final = 2**24  # characters of a cell, or of a line
_ROWS: Final = 1000  # of a batch
_BATCH: Final = 2**24  # characters of a batch, which may have fewer rows
_KNOWN: Final = frozenset(name for names in NAMES.values() for name in names)
_QUOTES: Final = 'enclose cells that contain quotes, line breaks or {!r} in quotes ("), and double the quotes in them'


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a file is written.

    Attributes:
        form: Its encoding.
        delimiter: What separates cells.
        skipped: Number of rows before the first one, with the header.
        names: The names of the columns; empty for a column that is not used.
    """

    form: UnicodeForm
    delimiter: str
    skipped: int
    names: tuple[str, ...]


class _FaultyLineError(Exception):
    """A line that is no text of a table: what is wrong, and the fix."""

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what, self.fix = what, fix


def open_delimited(path: Path, kept: Sequence[str], cache_dir: str | Path | None) -> Any:
    """Return the rows of a CSV or TSV file as a memory-mapped ``datasets.Dataset`` of texts.

    Args:
        path: The file, in UTF-8, UTF-16 or UTF-32.
        kept: Names of columns that stay as they are; others may differ from a known name in case and spaces.
        cache_dir: Folder of the Arrow file; None is the user's cache folder.

    Raises:
        DataError: The file is missing, empty, not text, or no table.
    """
    check_is_file(path, fix="correct the path to the records")
    try:
        status = path.stat()
        layout = _read_layout(path, kept)
    except OSError as error:
        raise DataError.at(str(path), f"cannot be read ({error.strerror or error})", "correct the path") from error
    except UnicodeDecodeError:
        raise _undecodable(path) from None
    key = [_FORMAT, os.path.realpath(path), status.st_size, status.st_mtime_ns, list(layout.names), layout.delimiter]
    return store_batches(_batches(path, layout), key, str(path), cache_dir)


def _read_layout(path: Path, kept: Sequence[str]) -> _Layout:
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head.strip(b"\xef\xbb\xbf \t\r\n"):
        raise DataError.at(str(path), "the file is empty", "give a file with a header and at least one row")
    if (fault := find_foreign_format(str(path), head)) is not None:
        raise DataError(str(fault), (fault,))
    form = detect_unicode(head)
    with _open_text(path, form) as text:
        start = text.read(_HEAD)
    named = _NAMED_DELIMITER.fullmatch(start.partition("\n")[0])
    order = _DELIMITERS if path.suffix.lower() != ".tsv" else ("\t", *_DELIMITERS)
    read = [(one, *_header(start, one, int(named is not None))) for one in ((named[1],) if named else order)]
    # The header that has most of the names that are looked for, and then most cells, is read with the right delimiter.
    looked_for = _KNOWN | set(map(_plain, kept))
    delimiter, before, cells = max(
        read, key=lambda one: (sum(_plain(cell) in looked_for for cell in one[2]), len(one[2]))
    )
    if "\0" in "".join(cells):
        raise DataError.at(str(path), "contains a NUL character in its first line", "save the file as text in UTF-8")
    names = _name_columns(cells, kept)
    doubled = next((name for name in names if name and names.count(name) > 1), None)
    if doubled is not None:
        raise DataError.at(str(path), f"has the column {doubled[:40]!r} twice", "rename or remove one of them")
    if not any(names):
        raise DataError.at(str(path), "has no header", "write the names of the columns into the first row")
    return _Layout(form, delimiter, before + 1, tuple(names))


def _header(start: str, delimiter: str, first: int) -> tuple[int, list[str]]:
    """Return the number of rows before the header, which is not among the first ones, and its cells."""
    rows = csv.reader(io.StringIO(start, newline=""), delimiter=delimiter)
    try:
        for number, row in enumerate(rows):
            if number >= first and any(cell.strip() for cell in row):
                return number, row
    except csv.Error:  # with another delimiter there is a header
        pass
    return 0, []


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def _name_columns(cells: Sequence[str], kept: Sequence[str]) -> list[str]:
    stripped = [cell.strip() for cell in cells]
    names = [name if name in kept or _plain(name) not in _KNOWN else _plain(name) for name in stripped]
    # Only exact names where two columns would have the same.
    return names if len(set(names)) == len(set(stripped)) else stripped


def _open_text(path: Path, form: UnicodeForm) -> io.TextIOWrapper:
    file = path.open("rb")
    file.seek(form.mark)
    return io.TextIOWrapper(file, encoding=form.encoding, newline="")


def _lines(text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(_LONGEST + 1):
        if len(line) > _LONGEST:
            raise _FaultyLineError(f"has a line of more than {_LONGEST:,} characters", "shorten the text of the cell")
        if "\0" in line:
            raise _FaultyLineError("contains a NUL character", "remove it, or save the file as text in UTF-8")
        yield line


def _rows(path: Path, layout: _Layout) -> Iterator[list[str | None]]:
    """Yield the cells of each row; null for an empty one."""
    width = len(layout.names)
    with _open_text(path, layout.form) as text:
        reader = csv.reader(_lines(text), delimiter=layout.delimiter, strict=True)
        number = 0
        try:
            for cells in islice(reader, layout.skipped, None):
                if not cells:  # a blank line
                    continue
                if any(cells[width:]):
                    what = f"has {len(cells)} cells, expected {width} as in the header (line {reader.line_num})"
                    raise _FaultyLineError(what, _QUOTES.format(layout.delimiter))
                yield [cell or None for cell in cells[:width]] + [None] * (width - len(cells))
                number += 1
        except UnicodeDecodeError:
            raise _undecodable(path) from None
        except _FaultyLineError as error:
            raise DataError.at(f"{path}:{number}", error.what, error.fix) from None
        except csv.Error as error:
            what, fix = f"is no row of a table ({error}; line {reader.line_num})", _QUOTES.format(layout.delimiter)
            if "field larger" in str(error) or "unexpected end of data" in str(error):
                what = f"has a cell that begins with a quote and does not end (read to line {reader.line_num})"
            raise DataError.at(f"{path}:{number}", what, fix) from None


def _batches(path: Path, layout: _Layout) -> Iterator[Any]:
    """Yield the rows as Arrow tables."""
    import pyarrow as pa

    used = [number for number, name in enumerate(layout.names) if name]
    schema = pa.schema([(layout.names[number], pa.string()) for number in used])

    def table() -> Any:
        columns = list(zip(*batch, strict=True))
        return pa.table([pa.array(columns[number], pa.string()) for number in used], schema=schema)

    before = csv.field_size_limit(_LONGEST)
    try:
        batch: list[list[str | None]] = []
        size = 0
        for row in _rows(path, layout):
            batch.append(row)
            size += sum(len(cell) for cell in row if cell is not None)
            if len(batch) >= _ROWS or size > _BATCH:
                yield table()
                batch, size = [], 0
        if batch:
            yield table()
    finally:
        csv.field_size_limit(before)


def _undecodable(path: Path) -> LlavarError:
    """Return the error about the first byte that is not of the file's encoding."""
    with path.open("rb") as file:
        form = detect_unicode(file.read(_HEAD))
        file.seek(form.mark)
        fault = Fault(str(path), f"is not {form.encoding.upper()} throughout", "save the file again as UTF-8")
        if form.encoding != "utf-8":
            data = file.read()
            if first_undecodable(data, form.encoding) < len(data):
                fault = explain_encoding(data, str(path), path, base=form.mark, encoding=form.encoding)
            return DataError(str(fault), (fault,))
        base = form.mark
        for number, line in enumerate(file, 1):
            if first_undecodable(line) < len(line):
                fault = explain_encoding(line, str(path), path, base=base, line=number)
                break
            base += len(line)
    return DataError(str(fault), (fault,))
