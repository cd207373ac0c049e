"""The readings of ``ocr build`` on disk, checked when they are read: a file that anyone may have edited or damaged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from llavar_peft.data.resume_journal import read_entries
from llavar_peft.errors import DAMAGED, DataError, describe_reason

_Corners: TypeAlias = tuple[float, float, float, float, float, float, float, float]
_Line: TypeAlias = tuple[str, _Corners, float]
_FIX = "delete the file, and run `llavar-peft ocr build` again"


@dataclass(frozen=True, slots=True, kw_only=True)
class _StoredReading:
    """The fields of an entry and their types, as ``OcrReader`` writes them.

    ``page`` is empty for a page of a PDF document whose own text was used, else why it was not.
    """

    path: str
    size: int | None = None
    mtime_ns: int | None = None
    width: int = 0
    height: int = 0
    hash: str = "0"
    blank: bool = False
    page: str | None = None
    lines: dict[str, list[_Line]] | None = None
    again: list[_Line] | None = None
    profile: Literal["scene", "page"] | None = None
    error: str | None = None
    reason: Literal["broken_image", "engine_failed"] | None = None


_OF_IMAGES = ("width", "height", "hash", "blank")


def stored_readings(path: Path, engines: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(offset, entry)`` for the complete lines of a file of readings.

    Args:
        path: The file.
        engines: Names of engines whose lines each entry has.

    Raises:
        DataError: An entry is none that ``ocr build`` writes.
    """
    for offset, entry in read_entries(path):
        try:
            _check_reading(msgspec.convert(entry, _StoredReading), engines)
            missing = [key for key in _OF_IMAGES if key not in entry] if engines and "error" not in entry else []
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}")
        except DAMAGED as error:
            what = f"holds an entry that is no reading of an image ({describe_reason(error)})"
            raise DataError.at(str(path), what, _FIX) from error
        yield offset, entry


def _check_reading(reading: _StoredReading, engines: Sequence[str]) -> None:
    if reading.error is not None:
        if reading.reason is None:
            raise ValueError("an error without a reason")
        return
    if reading.lines is None or not set(engines) <= set(reading.lines):
        raise ValueError(f"expected lines of {', '.join(engines) or 'an engine'}")
    if not 0 <= int(reading.hash, 16) < 1 << 256:
        raise ValueError("the hash is longer than 64 digits")
    for lines in (*reading.lines.values(), reading.again or []):
        if not all(math.isfinite(number) for _, corners, confidence in lines for number in (*corners, confidence)):
            raise ValueError("a number is not finite")
