"""Read the records of benchmark files as published."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from llavar_peft.errors import DataError
from llavar_peft.evaluation.vqa.appendix_benchmarks import (
    is_chart_row,
    is_science_file,
    read_chart_row,
    read_label_lines,
    read_science_file,
)
from llavar_peft.text_files import read_json, read_json_lines

LOG_HEADER: Final = frozenset({"setting", "questions"})
"""Keys of the first line of the log that ``answer_questions`` writes."""
RECORD_FIX: Final = "write question, answers (a list) and image in each record"
_SPLITS: Final = ("split", "set_name", "data_split")
_OCR_VQA_SPLITS: Final[Mapping[int, str]] = {1: "train", 2: "val", 3: "test"}
"""Source: OCR-VQA's loadDataset.py, which is distributed with its dataset.json."""


def read_rows(path: Path, split: str | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read records of any known format.

    Args:
        path: ``.json``, ``.jsonl``, or the ``.txt`` of CT80 or POIE.
        split: Only read records of this split, under any of the known keys.

    Yields:
        The location of each record for messages, and the record. The header of a log of answers is skipped.

    Raises:
        DataError: The file cannot be read, its format is unknown, or a record does not give its split.
    """
    rows: Iterable[Any]
    if path.suffix.lower() == ".jsonl":
        rows = (row for _, row in read_json_lines(path, lenient=True))
    elif path.suffix.lower() == ".txt":
        rows = read_label_lines(path)
    else:
        rows = _unwrap(path, read_json(path, fix="give a file of questions", lenient=True))
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError.at(f"{path}:{index}", f"is {type(row).__name__}, expected an object", RECORD_FIX)
        if set(row) == LOG_HEADER:
            continue
        if split is None or _read_split(row, f"{path}:{index}") == split:
            yield f"{path}:{index}", read_chart_row(row) if is_chart_row(row) else row


def _read_split(row: Mapping[str, Any], where: str) -> str:
    value = next((row[key] for key in _SPLITS if row.get(key) is not None), None)
    if value is None:
        raise DataError.at(where, "does not give its split", "leave out --split, or use another file")
    return _OCR_VQA_SPLITS.get(value, str(value)) if isinstance(value, int) else str(value)


def _unwrap(path: Path, content: Any) -> Iterable[Any]:
    if isinstance(content, Mapping) and isinstance(content.get("data"), list):  # ST-VQA, TextVQA, DocVQA
        content = content["data"]
    if isinstance(content, list):
        return content
    books = content if isinstance(content, Mapping) else {}
    if is_science_file(books):
        return read_science_file(path, books)
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
