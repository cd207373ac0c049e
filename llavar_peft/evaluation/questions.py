"""Questions about pictures with their right answers, from the benchmarks' own files or from anyone's.

Known are: MultimodalOCR's predictions (``gt_answers``, ``image_path``, ``answer``), the annotations of ST-VQA, TextVQA,
DocVQA and OCR-VQA, any JSON or JSON-lines file of ``question`` / ``answers`` / ``image``, and records in the released
training format, whose first question is asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypedDict

from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.data.records import parse_record
from llavar_peft.errors import DataError, LlavarError

LOG_HEADER: Final = frozenset({"setting", "questions"})
"""Keys of the first line of the answers that ``answering`` keeps."""

_IDS: Final = ("question_id", "questionId", "id")
_TRUTHS: Final = ("gt_answers", "answers", "truths", "truth")
_ANSWERS: Final = ("prediction", "predict", "answer")
_IMAGES: Final = ("image_path", "image", "file_path", "file_name", "image_id")
_MEASURES: Final = ("text_height", "box", "image_width", "image_height")
_USED: Final = {*_IDS, *_TRUTHS, *_ANSWERS, *_IMAGES, *_MEASURES, "question", "conversations"}
_LONGEST_FIELD: Final = 40
_MEND: Final = "write question, answers (a list) and image in each record"


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        id: Tells it from the others of its file; its index where the file has no ids of its own.
        question: The words.
        truths: The right answers.
        image: The picture's path as the file has it.
        answer: What a model said, in a file of predictions.
        fields: What else the file says of it in a word, e.g. ``{"dataset": "coco-text"}``: kinds to tell apart.
        text_height: Of the letters that hold the answer, in the picture's pixels.
        box: Of the text that holds the answer: left, top, right, bottom, in the picture's pixels.
        size: Of the picture, (width, height).
    """

    id: str
    question: str
    truths: tuple[str, ...]
    image: str | None = None
    answer: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    text_height: float | None = None
    box: tuple[float, float, float, float] | None = None
    size: tuple[int, int] | None = None


def read_questions(path: str | Path, *, limit: int | None = None) -> tuple[Question, ...]:
    """Reads a file of questions.

    Args:
        path: ``.json`` or ``.jsonl``, of one of the forms above.
        limit: Takes the first ones only.

    Returns:
        The questions in the file's order.

    Raises:
        DataError: The file cannot be read, or a record lacks its question or its answers.
    """
    questions: list[Question] = []
    for where, row in _rows(Path(path)):
        if limit is not None and len(questions) == limit:
            break
        questions.append(_parse(row, where, str(len(questions))))
    if not questions:
        raise DataError.at(str(path), "holds no questions", "give a file with at least one")
    ids = [question.id for question in questions]
    if len(set(ids)) == len(ids):
        return tuple(questions)
    return tuple(replace(question, id=str(index)) for index, question in enumerate(questions))


def read_predictions(
    path: str | Path, dataset: str | Path | None = None, *, limit: int | None = None
) -> tuple[Question, ...]:
    """Reads answers that some model gave.

    Args:
        path: Records with the answer (``prediction``, ``predict`` or ``answer``), and, unless there is a data set, with
            question and truths.
        dataset: Where question and truths are; the predictions then bear its ids, and each question has one.
        limit: Takes the first questions only.

    Returns:
        The questions, each with its answer.

    Raises:
        DataError: A file cannot be read, or an answer is missing or belongs to no question.
    """
    if dataset is None:
        questions = read_questions(path, limit=limit)
        for index, question in enumerate(questions):
            if question.answer is None:
                raise DataError.at(f"{path}:{index}", "has no answer", "write what the model said under 'answer'")
        return questions
    asked = read_questions(dataset, limit=limit)
    said: dict[str, str] = {}
    for where, row in _rows(Path(path)):
        identity, answer = _first(row, _IDS), _first(row, _ANSWERS)
        if identity is None or not isinstance(answer, str):
            raise DataError.at(where, "has no question_id or no answer", "write both in each record")
        said[str(identity)] = answer
    absent = [question.id for question in asked if question.id not in said]
    if absent:
        shown = ", ".join(absent[:5])
        raise DataError.at(
            str(path),
            f"answers {len(asked) - len(absent)} of {len(asked)} questions of {dataset} (missing: {shown})",
            "give the answers to all of them, with the data set's ids",
        )
    return tuple(replace(question, answer=said[question.id]) for question in asked)


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError.at(str(path), f"cannot be read ({error})", "correct the path") from error
    rows = _lines(path, text) if path.suffix.lower() == ".jsonl" else _unwrapped(path, text)
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError.at(f"{path}:{index}", f"is {type(row).__name__}, wanted an object", _MEND)
        if set(row) == LOG_HEADER:  # the answers that a run keeps may be scored as they are
            continue
        yield f"{path}:{index}", row


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
    """OCR-VQA: questions and answers by book; its pictures are called as the book, with their address's ending."""
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


def _parse(row: Mapping[str, Any], where: str, index: str) -> Question:
    if "conversations" in row:
        return _parse_record(row, where)
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise DataError.at(where, "has no question", _MEND)
    # In a file of questions alone, "answer" is the right one.
    truth_key = next((key for key in (*_TRUTHS, "answer") if row.get(key) not in (None, [])), None)
    if truth_key is None:
        raise DataError.at(where, "has no right answers", "use a part of the data set whose answers are public")
    return Question(
        id=str(_first(row, _IDS) or index),
        question=question,
        truths=_truths(row[truth_key], f"{where}: {truth_key}"),
        image=_image(row, where),
        answer=None if truth_key == "answer" else _answer(row, where),
        fields=_fields(row),
        **read_measures(row, where),
    )


def _parse_record(row: Mapping[str, Any], where: str) -> Question:
    conversation = parse_record(row, where)
    if len(conversation.turns) < 2 or len(conversation.images) > 1:
        raise DataError.at(where, "has no answer, or several pictures", "leave the record out")
    asked, answered = conversation.turns[:2]
    return Question(
        id=conversation.id,
        question=asked.text.replace(IMAGE_PLACEHOLDER, "").strip(),
        truths=(answered.text.strip(),),
        image=conversation.images[0] if conversation.images else None,
        fields=_fields(row),
        **read_measures(row, where),
    )


class Measures(TypedDict):
    """What a record says of its text's size; see ``Question``."""

    text_height: float | None
    box: tuple[float, float, float, float] | None
    size: tuple[int, int] | None


def read_measures(row: Mapping[str, Any], where: str) -> Measures:
    """Takes from a record how large its text is.

    Args:
        row: The record.
        where: Its name in messages.

    Returns:
        What it says, None for what it does not.

    Raises:
        DataError: A height that is no positive number, or a box without area.
    """
    return {"text_height": _number(row, "text_height", where), "box": _box(row, where), "size": _size(row)}


def _first(row: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _truths(value: Any, where: str) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    texts = [entry.get("answer") if isinstance(entry, Mapping) else entry for entry in listed]
    if not all(isinstance(text, str | int | float) and not isinstance(text, bool) for text in texts):
        raise DataError.at(where, "are not texts", "write the right answers as a list of texts")
    return tuple(str(text) for text in texts)


def _answer(row: Mapping[str, Any], where: str) -> str | None:
    answer = _first(row, _ANSWERS)
    if answer is not None and not isinstance(answer, str):
        raise _not_text(where, "answer")
    return answer


def _image(row: Mapping[str, Any], where: str) -> str | None:
    key = next((key for key in _IMAGES if row.get(key) not in (None, "")), None)
    if key is None:
        return None
    if not isinstance(row[key], str | int):
        raise _not_text(where, key)
    name = str(row[key])
    if key == "file_name" and isinstance(row.get("dataset"), str):  # ST-VQA
        return f"{row['dataset']}/{name}"
    # TextVQA names the picture without its ending.
    return f"{name}.jpg" if key == "image_id" and not PurePosixPath(name).suffix else name


def _not_text(where: str, key: str) -> LlavarError:
    return DataError.at(f"{where}: {key}", "is not a text", _MEND)


def _fields(row: Mapping[str, Any]) -> dict[str, str]:
    """What may tell kinds apart: short values under other keys; of a list (DocVQA's question types) all of them."""
    fields = {}
    for key, value in row.items():
        listed = isinstance(value, list) and bool(value) and all(isinstance(entry, str) for entry in value)
        kind = " + ".join(sorted(value)) if listed else value
        if key not in _USED and isinstance(kind, str | int) and 0 < len(str(kind)) <= _LONGEST_FIELD:
            fields[key] = str(kind)
    return fields


def _number(row: Mapping[str, Any], key: str, where: str) -> float | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise DataError.at(f"{where}: {key}", f"got {value!r}, wanted a positive number", "give pixels of the picture")
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
