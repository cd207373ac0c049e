"""How large a record says that its text is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypedDict

from llavar_peft.errors import DataError

MEASURES: Final = ("text_height", "box", "image_width", "image_height")
"""The keys that say it."""


class TextSize(TypedDict):
    """What a record says of its text's size; see ``questions.Question``."""

    text_height: float | None
    box: tuple[float, float, float, float] | None
    size: tuple[int, int] | None


def read_text_size(row: Mapping[str, Any], where: str) -> TextSize:
    """Take from a record how large its text is.

    Args:
        row: The record.
        where: Its name in messages.

    Returns:
        What it says, None for what it does not.

    Raises:
        DataError: A height that is no positive number, or a box without area.
    """
    return {"text_height": _number(row, "text_height", where), "box": _box(row, where), "size": _size(row)}


def _number(row: Mapping[str, Any], key: str, where: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise DataError.at(
            f"{where}: {key}", f"got {value!r}, expected a positive number", "give pixels of the picture"
        )
    return float(value)


def _box(row: Mapping[str, Any], where: str) -> tuple[float, float, float, float] | None:
    value = row.get("box")
    if value is None:
        return None
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 4 or not all(isinstance(number, int | float) for number in numbers):
        raise DataError.at(
            f"{where}: box", "is not four numbers", "give left, top, right, bottom in the picture's pixels"
        )
    left, top, right, bottom = (float(number) for number in numbers)
    if right <= left or bottom <= top:
        raise DataError.at(f"{where}: box", f"has no area (got {value})", "give left, top, right, bottom")
    return left, top, right, bottom


def _size(row: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = row.get("image_width"), row.get("image_height")
    ints = isinstance(width, int) and isinstance(height, int)
    return (int(width), int(height)) if ints and width and height and width > 0 and height > 0 else None
