"""Questions about images with their right answers, from the benchmarks' own files or from anyone's.

Known are: MultimodalOCR's predictions (``gt_answers``, ``image_path``, ``answer``), the annotations of ST-VQA, TextVQA,
DocVQA and OCR-VQA, any JSON or JSON-lines file of ``question`` / ``answers`` / ``image``, and records in the released
training format, whose first question is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.data.record_store import parse_record
from llavar_peft.errors import DataError, LlavarError
from llavar_peft.evaluation.vqa.benchmark_files import MEND, read_rows
from llavar_peft.evaluation.vqa.text_size import MEASURES, read_text_size

_IDS: Final = ("question_id", "questionId", "id")
_TRUTHS: Final = ("gt_answers", "answers", "truths", "truth")
_ANSWERS: Final = ("prediction", "predict", "answer")
_IMAGES: Final = ("image_path", "image", "file_path", "file_name", "image_id")
_USED: Final = {*_IDS, *_TRUTHS, *_ANSWERS, *_IMAGES, *MEASURES, "question", "conversations"}
_LONGEST_FIELD: Final = 40


@dataclass(frozen=True, slots=True)
class VqaQuestion:
    """One question.

    Attributes:
        id: Tells it from the others of its file; its index where the file has no ids of its own.
        question: The words.
        truths: The right answers.
        image: The image's path as the file has it.
        answer: What a model said, in a file of predictions.
        fields: What else the file says of it in a word, e.g. ``{"dataset": "coco-text"}``: kinds to tell apart.
        text_height: Of the letters that hold the answer, in the image's pixels.
        box: Of the text that holds the answer: left, top, right, bottom, in the image's pixels.
        size: Of the image, (width, height).
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


def read_vqa_questions(
    path: str | Path, *, limit: int | None = None, split: str | None = None
) -> tuple[VqaQuestion, ...]:
    """Read a file of questions.

    Args:
        path: ``.json`` or ``.jsonl``, of one of the forms above.
        limit: Takes the first ones only.
        split: Takes those of this part only: ``train``, ``val`` or ``test``.

    Returns:
        The questions in the file's order. Where two have one id, all are called by their places.

    Raises:
        DataError: The file cannot be read, a record lacks its question or its answers, or there is no such part.
    """
    questions = [question for _, question in _read(path, limit, split)]
    if len({question.id for question in questions}) == len(questions):
        return tuple(questions)
    return tuple(replace(question, id=str(index)) for index, question in enumerate(questions))


def _read(path: str | Path, limit: int | None, split: str | None) -> list[tuple[str, VqaQuestion]]:
    """The questions as they are, each with its name in messages."""
    questions: list[tuple[str, VqaQuestion]] = []
    for where, row in read_rows(Path(path), split):
        if limit is not None and len(questions) == limit:
            break
        questions.append((where, _parse(row, where, str(len(questions)))))
    if not questions:
        of = "" if split is None else f" of the split {split!r}"
        raise DataError.at(str(path), f"holds no questions{of}", "give a file with at least one")
    return questions


def read_predictions(
    path: str | Path, dataset: str | Path | None = None, *, limit: int | None = None, split: str | None = None
) -> tuple[VqaQuestion, ...]:
    """Read answers that some model gave.

    Args:
        path: Records with the answer (``prediction``, ``predict`` or ``answer``), and, unless there is a data set, with
            question and truths.
        dataset: Where question and truths are; the predictions then bear its ids, and each question has one. The
            answer may be called ``text`` then, as in the original's files.
        limit: Takes the first questions only.
        split: Takes the questions of this part only.

    Returns:
        The questions, each with its answer.

    Raises:
        DataError: A file cannot be read, an answer is missing or belongs to no question, or, where there is a data
            set, an id is not one question's alone.
    """
    if dataset is None:
        questions = read_vqa_questions(path, limit=limit, split=split)
        for index, question in enumerate(questions):
            if question.answer is None:
                raise DataError.at(f"{path}:{index}", "has no answer", "write what the model said under 'answer'")
        return questions
    asked = [question for _, question in _all_different(_read(dataset, limit, split))]
    said: dict[str, str] = {}
    for where, row in read_rows(Path(path)):
        identity, answer = _identity(row), _text(row, (*_ANSWERS, "text"), where)
        if identity is None or answer is None:
            lacking = "question_id" if identity is None else "answer"
            raise DataError.at(where, f"has no {lacking}", "write question_id and answer in each record")
        if identity in said:
            raise DataError.at(where, f"answers the question {identity!r} again", "give one answer to each")
        said[identity] = answer
    absent = [question.id for question in asked if question.id not in said]
    if absent:
        shown = ", ".join(absent[:5])
        raise DataError.at(
            str(path),
            f"answers {len(asked) - len(absent)} of {len(asked)} questions of {dataset} (missing: {shown})",
            "give the answers to all of them, with the data set's ids",
        )
    return tuple(replace(question, answer=said[question.id]) for question in asked)


def _all_different(questions: list[tuple[str, VqaQuestion]]) -> list[tuple[str, VqaQuestion]]:
    """Two questions of one id would both get the answer to one of them."""
    places: dict[str, str] = {}
    for where, question in questions:
        if question.id in places:
            raise DataError.at(
                where,
                f"has the id {question.id!r} of {places[question.id]} too, so that answers cannot be told apart",
                "give each question an id of its own, or predictions with question and gt_answers and no data set",
            )
        places[question.id] = where
    return questions


def _parse(row: Mapping[str, Any], where: str, index: str) -> VqaQuestion:
    if "conversations" in row:
        return _parse_record(row, where)
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise DataError.at(where, "has no question", MEND)
    # In a file of questions alone, "answer" is the right one; beside a list of right ones, though empty, it is not.
    keys = ("answer",) if not any(key in row for key in _TRUTHS) else _TRUTHS
    truth_key = next((key for key in keys if row.get(key) not in (None, [])), None)
    if truth_key is None:
        empty = next((f" ({key} is empty)" for key in _TRUTHS if key in row), "")
        raise DataError.at(where, f"has no right answers{empty}", "use a part of the data set whose answers are public")
    return VqaQuestion(
        id=_identity(row) or index,
        question=question,
        truths=_truths(row[truth_key], f"{where}: {truth_key}"),
        image=_image(row, where),
        answer=None if truth_key == "answer" else _text(row, _ANSWERS, where),
        fields=_fields(row),
        **read_text_size(row, where),
    )


def _parse_record(row: Mapping[str, Any], where: str) -> VqaQuestion:
    conversation = parse_record(row, where)
    if len(conversation.turns) < 2 or len(conversation.images) > 1:
        raise DataError.at(where, "has no answer, or several pictures", "leave the record out")
    asked, answered = conversation.turns[:2]
    return VqaQuestion(
        id=conversation.id,
        question=asked.text.replace(IMAGE_PLACEHOLDER, "").strip(),
        truths=(answered.text.strip(),),
        image=conversation.images[0] if conversation.images else None,
        fields=_fields(row),
        **read_text_size(row, where),
    )


def _first(row: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _identity(row: Mapping[str, Any]) -> str | None:
    value = _first(row, _IDS)  # 0 is an id like any other
    return None if value in (None, "") else str(value)


def _truths(value: Any, where: str) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    texts = [entry.get("answer") if isinstance(entry, Mapping) else entry for entry in listed]
    if not all(isinstance(text, str | int | float) and not isinstance(text, bool) for text in texts):
        raise DataError.at(where, "are not texts", "write the right answers as a list of texts")
    return tuple(str(text) for text in texts)


def _text(row: Mapping[str, Any], keys: tuple[str, ...], where: str) -> str | None:
    """The first of these that is there; a number counts as the text that it is written as."""
    value = _first(row, keys)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _not_text(where, "answer")
    return str(value)


def _image(row: Mapping[str, Any], where: str) -> str | None:
    key = next((key for key in _IMAGES if row.get(key) not in (None, "")), None)
    if key is None:
        return None
    if not isinstance(row[key], str | int):
        raise _not_text(where, key)
    name = str(row[key])
    if key == "file_name" and isinstance(row.get("dataset"), str):  # ST-VQA
        return f"{row['dataset']}/{name}"
    # TextVQA names the image without its ending.
    return f"{name}.jpg" if key == "image_id" and not PurePosixPath(name).suffix else name


def _not_text(where: str, key: str) -> LlavarError:
    return DataError.at(f"{where}: {key}", "is not a text", MEND)


def _fields(row: Mapping[str, Any]) -> dict[str, str]:
    """What may tell kinds apart: short values under other keys; of a list (DocVQA's question types) all of them."""
    fields = {}
    for key, value in row.items():
        listed = isinstance(value, list) and bool(value) and all(isinstance(entry, str) for entry in value)
        kind = " + ".join(sorted(value)) if listed else value
        if key not in _USED and isinstance(kind, str | int) and 0 < len(str(kind)) <= _LONGEST_FIELD:
            fields[key] = str(kind)
    return fields
