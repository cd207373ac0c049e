"""JSON Lines that a run may still be writing, read with each fault named by its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from llavar_peft.data.json_lines import read_json_lines
from llavar_peft.errors import DataError, LlavarError

MEND_LINE = "take the line out, or fetch the file again from the run"


class JsonRecord:
    """One JSON object with its place in the files.

    Each method returns one field, checked, and raises ``DataError`` with the place and the key.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise DataError.at(where, f"expected an object, got {type(value).__name__}", MEND_LINE)
        self._value = cast("Mapping[str, object]", value)
        self.where = where

    def _fault(self, key: str, expected: str) -> LlavarError:
        got = repr(self._value[key]) if key in self._value else "nothing"
        return DataError.at(f"{self.where}:{key}", f"expected {expected}, got {got[:80]}", MEND_LINE)

    def text(self, key: str) -> str:
        """Return a string."""
        value = self._value.get(key)
        if not isinstance(value, str):
            raise self._fault(key, "a string")
        return value

    def optional_text(self, key: str) -> str | None:
        """Return a string, or None where there is none."""
        return None if self._value.get(key) is None else self.text(key)

    def integer(self, key: str) -> int:
        """Return an integer."""
        value = self._value.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._fault(key, "an integer")
        return value

    def number(self, key: str) -> float:
        """Return a number; NaN and the infinities are numbers."""
        value = self._value.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._fault(key, "a number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        """Return a number, or None where there is none."""
        return None if self._value.get(key) is None else self.number(key)

    def flag(self, key: str) -> bool:
        """Return true or false."""
        if not isinstance(self._value.get(key), bool):
            raise self._fault(key, "true or false")
        return bool(self._value[key])

    def records(self, key: str) -> Iterator[JsonRecord]:
        """Yield the objects of a list, which may be absent."""
        value = self._value.get(key)
        if value is not None and not isinstance(value, list):
            raise self._fault(key, "a list")
        for number, item in enumerate(value or ()):
            yield JsonRecord(item, f"{self.where}:{key}.{number}")


def read_lines(path: Path) -> Iterator[JsonRecord]:
    """Yield the objects of a JSON Lines file; an unfinished last line is left out."""
    for where, value in read_json_lines(path, fix=MEND_LINE, unfinished=True):
        yield JsonRecord(value, where)
