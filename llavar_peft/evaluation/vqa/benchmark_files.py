"""Read the records of benchmark files as published, and the size of the text that a record gives."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypedDict

from llavar_peft.errors import DataError, describe_reason

LOG_HEADER: Final = frozenset({"setting", "questions"})
"""Keys of the first line of the log that ``answer_questions`` writes."""
RECORD_FIX: Final = "write question, answers (a list) and image in each record"
SIZE_KEYS: Final = ("text_height", "box", "image_width", "image_height")
"""Keys that give the size of a record's text."""

_SPLITS: Final = ("split", "set_name", "data_split")
_OCR_VQA_SPLITS: Final[Mapping[int, str]] = {1: "train", 2: "val", 3: "test"}
"""Source: OCR-VQA's loadDataset.py, which is distributed with its dataset.json."""


def read_rows(path: Path, split: str | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read records of any known format.

    Args:
        path: ``.json`` or ``.jsonl``.
        split: Only read records of this split, under any of the known keys.

    Yields:
        The location of each record for messages, and the record. The header of a log of answers is skipped.

    Raises:
        DataError: The file cannot be read, its format is unknown, or a record does not give its split.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError.at(str(path), f"cannot be read ({describe_reason(error)})", "correct the path") from error
    rows = _read_lines(path, text) if path.suffix.lower() == ".jsonl" else _unwrap(path, text)
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError.at(f"{path}:{index}", f"is {type(row).__name__}, expected an object", RECORD_FIX)
        if set(row) == LOG_HEADER:
            continue
        if split is None or _read_split(row, f"{path}:{index}") == split:
            yield f"{path}:{index}", row


def _read_split(row: Mapping[str, Any], where: str) -> str:
    value = next((row[key] for key in _SPLITS if row.get(key) is not None), None)
    if value is None:
        raise DataError.at(where, "does not give its split", "leave out --split, or use another file")
    return _OCR_VQA_SPLITS.get(value, str(value)) if isinstance(value, int) else str(value)


def _read_lines(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _decode(f"{path}:{number}", line)


def _unwrap(path: Path, text: str) -> Iterable[Any]:
    content = _decode(str(path), text)
    if isinstance(content, Mapping) and isinstance(content.get("data"), list):  # ST-VQA, TextVQA, DocVQA
        content = content["data"]
    if isinstance(content, list):
        return content
    books = content if isinstance(content, Mapping) else {}
    if books and all(isinstance(book, Mapping) and isinstance(book.get("questions"), list) for book in books.values()):
        return (row for name, book in books.items() for row in _read_book(path, name, book))
    raise DataError.at(str(path), "has an unknown format", "give a list of records, or an annotation file as published")


def _read_book(path: Path, name: str, book: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the records of a book of OCR-VQA. Its image has the book's name and the extension of its URL."""
    questions, answers = book["questions"], book.get("answers")
    if not isinstance(answers, list) or len(answers) != len(questions):
        raise DataError.at(
            f"{path}:{name}", "the number of answers is not the number of questions", "download the file again"
        )
    extension = PurePosixPath(str(book.get("imageURL", ""))).suffix or ".jpg"
    shared = {key: book[key] for key in ("genre", "split") if key in book}
    return [
        {"id": f"{name}/{number}", "question": question, "answers": [answer], "image": f"{name}{extension}", **shared}
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]


def _decode(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError.at(
            where, f"is not JSON ({describe_reason(error)})", "write or download the file again"
        ) from error


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
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise DataError.at(
            f"{where}: text_height", f"got {value!r}, expected a positive number", "give the height in image pixels"
        )
    return float(value)


def _read_box(row: Mapping[str, Any], where: str) -> tuple[float, float, float, float] | None:
    value = row.get("box")
    if value is None:
        return None
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 4 or not all(isinstance(number, int | float) for number in numbers):
        raise DataError.at(f"{where}: box", "is not four numbers", "give left, top, right, bottom in image pixels")
    left, top, right, bottom = (float(number) for number in numbers)
    if right <= left or bottom <= top:
        raise DataError.at(f"{where}: box", f"has no area (got {value})", "give left, top, right, bottom")
    return left, top, right, bottom


def _read_image_size(row: Mapping[str, Any]) -> tuple[int, int] | None:
    width, height = row.get("image_width"), row.get("image_height")
    ints = isinstance(width, int) and isinstance(height, int)
    return (int(width), int(height)) if ints and width and height and width > 0 and height > 0 else None
