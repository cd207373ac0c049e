"""The size of a record's text, where the record states it: keys that ``synth`` and ``ocr build`` write too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypedDict

from llavar_peft.errors import DataError

SIZE_KEYS: Final = ("text_height", "box", "image_width", "image_height")
"""Keys that give the size of a record's text."""

SMALLEST_LETTERS: Final = 7.0
"""Pixels of the tower's input below which letters are too small: two lines then share a patch of 14 pixels.

Source: arXiv 2306.17107, figure 3.
"""

_MOST: Final = 1e9  # pixels


class TextSize(TypedDict):
    """The size of a record's text; the keys are fields of ``VqaQuestion``."""

    text_height: float | None
    box: tuple[float, float, float, float] | None
    size: tuple[int, int] | None


def read_text_size(row: Mapping[str, Any], where: str) -> TextSize:
    """Read the size of a record's text; values that the record lacks are None.

    Args:
        row: The record.
        where: Its location in messages.

    Raises:
        DataError: A height is not a positive number, or a box has no area.
    """
    return {"text_height": _read_height(row, where), "box": _read_box(row, where), "size": _read_image_size(row)}


def _read_height(row: Mapping[str, Any], where: str) -> float | None:
    value = row.get("text_height")
    if value is None:
        return None
    if not _is_size(value):
        raise DataError.at(
            f"{where}: text_height", f"got {value!r}, expected a positive number", "give the height in image pixels"
        )
    return float(value)


def _read_box(row: Mapping[str, Any], where: str) -> tuple[float, float, float, float] | None:
    value = row.get("box")
    if value is None:
        return None
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 4 or not all(isinstance(number, int | float) and abs(number) < _MOST for number in numbers):
        raise DataError.at(f"{where}: box", "is not four numbers", "give left, top, right, bottom in image pixels")
    left, top, right, bottom = (float(number) for number in numbers)
    if right <= left or bottom <= top:
        raise DataError.at(f"{where}: box", f"has no area (got {value})", "give left, top, right, bottom")
    return left, top, right, bottom


def _read_image_size(row: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = row.get("image_width"), row.get("image_height")
    if not (isinstance(width, int) and isinstance(height, int) and _is_size(width) and _is_size(height)):
        return None
    return width, height


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _MOST
