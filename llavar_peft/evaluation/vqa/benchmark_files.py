"""Files of questions and answers as benchmarks publish them, taken apart into records."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from llavar_peft.errors import DataError

LOG_HEADER: Final = frozenset({"setting", "questions"})
"""Keys of the first line of the answers that ``answering`` keeps."""
MEND: Final = "write question, answers (a list) and image in each record"
"""What to do about a record that is no question."""

_SPLITS: Final = ("split", "set_name", "data_split")
_OCR_VQA_SPLITS: Final[Mapping[int, str]] = {1: "train", 2: "val", 3: "test"}
"""Source: OCR-VQA's loadDataset.py, which comes with its dataset.json."""


def read_rows(path: Path, split: str | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Read records of any known form.

    Args:
        path: ``.json`` or ``.jsonl``.
        split: Takes those of this part only, by whatever name the data set has it.

    Yields:
        Each record's name in messages, and the record. The head of the answers that a run keeps is left out.

    Raises:
        DataError: The file cannot be read, is of no known form, or does not say which part a record belongs to.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError.at(str(path), f"cannot be read ({error})", "correct the path") from error
    rows = _lines(path, text) if path.suffix.lower() == ".jsonl" else _unwrapped(path, text)
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError.at(f"{path}:{index}", f"is {type(row).__name__}, expected an object", MEND)
        if set(row) == LOG_HEADER:  # the answers that a run keeps may be scored as they are
            continue
        if split is None or _split_of(row, f"{path}:{index}") == split:
            yield f"{path}:{index}", row


def _split_of(row: Mapping[str, Any], where: str) -> str:
    value = next((row[key] for key in _SPLITS if row.get(key) is not None), None)
    if value is None:
        raise DataError.at(where, "does not say which split it belongs to", "leave --split out, or use another file")
    return _OCR_VQA_SPLITS.get(value, str(value)) if isinstance(value, int) else str(value)


def _lines(path: Path, text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _decoded(f"{path}:{number}", line)


def _unwrapped(path: Path, text: str) -> Iterable[Any]:
    content = _decoded(str(path), text)
    if isinstance(content, Mapping) and isinstance(content.get("data"), list):  # ST-VQA, TextVQA, DocVQA
        content = content["data"]
    if isinstance(content, list):
        return content
    books = content if isinstance(content, Mapping) else {}
    if books and all(isinstance(book, Mapping) and isinstance(book.get("questions"), list) for book in books.values()):
        return (row for name, book in books.items() for row in _questions_of_book(path, name, book))
    raise DataError.at(
        str(path), "is of an unknown form", "give a list of records, or an annotation as it was published"
    )


def _questions_of_book(path: Path, name: str, book: Mapping[str, Any]) -> list[dict[str, Any]]:
    """OCR-VQA: questions and answers by book; its images are called as the book, with their address's ending."""
    questions, answers = book["questions"], book.get("answers")
    if not isinstance(answers, list) or len(answers) != len(questions):
        raise DataError.at(f"{path}:{name}", "does not have as many answers as questions", "fetch the file again")
    ending = PurePosixPath(str(book.get("imageURL", ""))).suffix or ".jpg"
    shared = {key: book[key] for key in ("genre", "split") if key in book}
    return [
        {"id": f"{name}/{number}", "question": question, "answers": [answer], "image": f"{name}{ending}", **shared}
        for number, (question, answer) in enumerate(zip(questions, answers, strict=True))
    ]


def _decoded(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError.at(where, f"is not JSON ({error})", "write or fetch the file again") from error
