"""Read JSON Lines files that a run may still be writing, and report each fault with its place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from llavar_peft.errors import DataError, LlavarError

FIX_LINE = "remove the line, or copy the file from the run again"


class JsonRecord:
    """A JSON object with its place in a file.

    Each method returns one field and raises ``DataError``, with the place and the key, if it has the wrong type.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise DataError.at(where, f"wrong type (got {type(value).__name__}, expected an object)", FIX_LINE)
        self._value = cast("Mapping[str, object]", value)
        self.where = where

    def _fault(self, key: str, expected: str) -> LlavarError:
        got = repr(self._value[key])[:80] if key in self._value else "nothing"
        return DataError.at(f"{self.where}:{key}", f"wrong value (got {got}, expected {expected})", FIX_LINE)

    def text(self, key: str) -> str:
        """Return a string."""
        value = self._value.get(key)
        if not isinstance(value, str):
            raise self._fault(key, "a string")
        return value

    def optional_text(self, key: str) -> str | None:
        """Return a string, or None if it is missing or null."""
        return None if self._value.get(key) is None else self.text(key)

    def integer(self, key: str) -> int:
        """Return an integer."""
        value = self._value.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._fault(key, "an integer")
        return value

    def number(self, key: str) -> float:
        """Return a number, which may be NaN or infinite."""
        value = self._value.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._fault(key, "a number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """Return a number, or None if it is missing or null."""
        return None if self._value.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        """Return true or false."""
        if not isinstance(self._value.get(key), bool):
            raise self._fault(key, "true or false")
        return bool(self._value[key])

    def records(self, key: str) -> Iterator[JsonRecord]:
        """Yield the objects of a list, which may be missing."""
        value = self._value.get(key)
        if value is not None and not isinstance(value, list):
            raise self._fault(key, "a list")
        for number, item in enumerate(value or ()):
            yield JsonRecord(item, f"{self.where}:{key}.{number}")


def read_lines(path: Path) -> Iterator[JsonRecord]:
    """Yield the objects of a JSON Lines file, without an incomplete last line."""
    if not path.is_file():
        return
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    for position, (number, line) in enumerate(lines, 1):
        where = f"{path}:{number}"
        try:
            value = json.loads(line.decode("utf-8"))
        except ValueError as error:
            if position == len(lines):
                return
            raise DataError.at(where, f"not valid JSON ({error})", FIX_LINE) from error
        yield JsonRecord(value, where)
