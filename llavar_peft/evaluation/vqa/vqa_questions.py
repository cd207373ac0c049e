"""Questions about images with their correct answers, from benchmark files or the user's own.

Known formats: MultimodalOCR's predictions (``gt_answers``, ``image_path``, ``answer``); the annotations of ST-VQA,
TextVQA, DocVQA and OCR-VQA, and those of ``appendix_benchmarks``; any JSON or JSON-lines file with ``question``,
``answers`` and ``image``; and records in the released training format, whose first question is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from llavar_peft.data.record_store import parse_record, text_without_images
from llavar_peft.data.text_metrics import is_blank
from llavar_peft.data.text_size import SIZE_KEYS, read_text_size
from llavar_peft.errors import DataError, Fault, LlavarError
from llavar_peft.evaluation.vqa.benchmark_files import RECORD_FIX, read_rows
from llavar_peft.text_files import text_problem
from llavar_peft.types import expand_home

_IDS: Final = ("question_id", "questionId", "id")
_TRUTHS: Final = ("gt_answers", "answers", "truths", "truth")
_ANSWERS: Final = ("prediction", "predict", "answer")
_IMAGES: Final = ("image_path", "image", "file_path", "file_name", "image_id")
_USED: Final = {*_IDS, *_TRUTHS, *_ANSWERS, *_IMAGES, *SIZE_KEYS, "question", "conversations", "messages"}
_LONGEST_FIELD: Final = 40
_SHOWN: Final = 5
_NO_TRUTHS_FIX: Final = "remove the record, or use a split whose answers are public"


@dataclass(frozen=True, slots=True)
class VqaQuestion:
    """A question with its correct answers.

    Attributes:
        id: Identifies it within its file; its index where the file has no ids.
        question: The text of the question.
        truths: The correct answers.
        image: The image's path as given in the file.
        answer: A model's answer, in a file of predictions.
        fields: Other short values of the record, e.g. ``{"dataset": "coco-text"}``, by which results are grouped.
        text_height: Height of the letters that hold the answer, in image pixels.
        box: Box of the text that holds the answer: left, top, right, bottom, in image pixels.
        size: (width, height) of the image.
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
        path: ``.json``, ``.jsonl`` or ``.txt``, in one of the formats above.
        limit: Only read the first questions.
        split: Only read this split: ``train``, ``val`` or ``test``.

    Returns:
        The questions in the order of the file. If ids are not unique, all questions get their index as id.

    Raises:
        DataError: The file cannot be read, a record lacks its question or its answers, or the split is empty.
    """
    questions = [question for _, question in _read(path, limit, split)]
    if len({question.id for question in questions}) == len(questions):
        return tuple(questions)
    return tuple(replace(question, id=str(index)) for index, question in enumerate(questions))


def _read(path: str | Path, limit: int | None, split: str | None) -> list[tuple[str, VqaQuestion]]:
    """Return the questions as given, each with its location in messages."""
    questions: list[tuple[str, VqaQuestion]] = []
    faults: list[Fault] = []
    for where, row in read_rows(expand_home(path), split):
        if limit is not None and len(questions) == limit:
            break
        try:
            questions.append((where, _parse(row, where, str(len(questions)))))
        except DataError as error:
            faults += error.faults
    if faults:
        more = f"\nand {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise DataError("\n".join(str(fault) for fault in faults[:_SHOWN]) + more, faults)
    if not questions:
        of = "" if split is None else f" of the split {split!r}"
        raise DataError.at(str(path), f"holds no questions{of}", "give a file with at least one")
    return questions


def read_predictions(
    path: str | Path, dataset: str | Path | None = None, *, limit: int | None = None, split: str | None = None
) -> tuple[VqaQuestion, ...]:
    """Read the answers of a model.

    Args:
        path: Records with the answer (``prediction``, ``predict`` or ``answer``) and, without ``dataset``, with
            question and truths.
        dataset: File with questions and truths. The predictions then have its ids, and each question has one
            prediction. The answer may also be called ``text``, as in the original's files.
        limit: Only read the first questions.
        split: Only read the questions of this split.

    Returns:
        The questions, each with its answer.

    Raises:
        DataError: A file cannot be read, an answer is missing or matches no question, or, with ``dataset``, an id is
            not unique.
    """
    if dataset is None:
        questions = read_vqa_questions(path, limit=limit, split=split)
        for index, question in enumerate(questions):
            if question.answer is None:
                raise DataError.at(f"{path}:{index}", "has no answer", "write the model's answer as 'answer'")
        return questions
    asked = [question for _, question in _check_unique_ids(_read(dataset, limit, split))]
    answers: dict[str, str] = {}
    for where, row in read_rows(expand_home(path)):
        identity, answer = _identity(row), _text(row, (*_ANSWERS, "text"), where)
        if identity is None or answer is None:
            lacking = "question_id" if identity is None else "answer"
            raise DataError.at(where, f"has no {lacking}", "write question_id and answer in each record")
        if identity in answers:
            raise DataError.at(where, f"is a second answer to the question {identity!r}", "give one answer to each")
        answers[identity] = answer
    absent = [question.id for question in asked if question.id not in answers]
    if absent:
        shown = ", ".join(absent[:5])
        raise DataError.at(
            str(path),
            f"answers {len(asked) - len(absent)} of {len(asked)} questions of {dataset} (missing: {shown})",
            "give answers to all questions, with the ids of the data set",
        )
    return tuple(replace(question, answer=answers[question.id]) for question in asked)


def _check_unique_ids(questions: list[tuple[str, VqaQuestion]]) -> list[tuple[str, VqaQuestion]]:
    """Raise ``DataError`` if two questions have the same id: both would get the same answer."""
    places: dict[str, str] = {}
    for where, question in questions:
        if question.id in places:
            raise DataError.at(
                where,
                f"has the same id {question.id!r} as {places[question.id]}, so that answers cannot be assigned",
                "make the ids unique, or give predictions with question and gt_answers and no data set",
            )
        places[question.id] = where
    return questions


def _parse(row: Mapping[str, Any], where: str, index: str) -> VqaQuestion:
    if "conversations" in row or "messages" in row:
        return _parse_record(row, where)
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise DataError.at(where, "has no question", RECORD_FIX)
    if problem := text_problem(question):
        raise DataError.at(where, f"the question {problem}", "write the whole text of the question")
    # "answer" is the truth in a file of questions, but the prediction in a record with a list of truths, even if empty.
    keys = ("answer",) if not any(key in row for key in _TRUTHS) else _TRUTHS
    truth_key = next((key for key in keys if row.get(key) not in (None, [])), None)
    truths = () if truth_key is None else _truths(row[truth_key], f"{where}: {truth_key}")
    if truth_key is None or all(map(is_blank, truths)):
        empty = next((f" ({key} is empty)" for key in (truth_key, *_TRUTHS) if key in row), "")
        raise DataError.at(where, f"has no correct answers{empty}", _NO_TRUTHS_FIX)
    return VqaQuestion(
        id=_identity(row) or index,
        question=question,
        truths=truths,
        image=_image(row, where),
        answer=None if truth_key == "answer" else _text(row, _ANSWERS, where),
        fields=_fields(row),
        **read_text_size(row, where),
    )


def _parse_record(row: Mapping[str, Any], where: str) -> VqaQuestion:
    conversation = parse_record(row, where)
    if len(conversation.turns) < 2 or len(conversation.images) > 1:
        raise DataError.at(where, "has no answer, or several images", "remove the record")
    asked, answered = conversation.turns[:2]
    if is_blank(answered.text):
        raise DataError.at(where, "has no correct answers (the answer is empty)", _NO_TRUTHS_FIX)
    return VqaQuestion(
        id=conversation.id,
        question=text_without_images(asked),
        truths=(answered.text.strip(),),
        image=next((image for image in conversation.images if isinstance(image, str)), None),
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
        raise DataError.at(where, "are not texts", "write the correct answers as a list of texts")
    return tuple(str(text) for text in texts)


def _text(row: Mapping[str, Any], keys: tuple[str, ...], where: str) -> str | None:
    """Return the value of the first present key; a number is converted to text."""
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
    # TextVQA gives the image without its extension.
    return f"{name}.jpg" if key == "image_id" and not PurePosixPath(name).suffix else name


def _not_text(where: str, key: str) -> LlavarError:
    return DataError.at(f"{where}: {key}", "is not a text", RECORD_FIX)


def _fields(row: Mapping[str, Any]) -> dict[str, str]:
    """Return short values under other keys, to group by; a list (DocVQA's question types) is joined."""
    fields = {}
    for key, value in row.items():
        listed = isinstance(value, list) and bool(value) and all(isinstance(entry, str) for entry in value)
        kind = " + ".join(sorted(value)) if listed else value
        if key not in _USED and isinstance(kind, str | int) and 0 < len(str(kind)) <= _LONGEST_FIELD:
            fields[key] = str(kind)
    return fields
