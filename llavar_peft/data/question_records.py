r"""Read rows of a question and its answer as conversations: the columns in which VQA and document data are published.

A row is ``{"image": ..., "question": ..., "answer": ...}``, with the names below, or one of

* ``{"images": [...], "texts": [{"user": ..., "assistant": ...}, ...]}``, as in the_cauldron;
* ``{"image": ..., "ground_truth": '{"gt_parse": {...}}'}``, as in CORD: the answer is the JSON of the fields.

The image stands before the question in about half of the rows and after it in the others, as in LLaVAR's own data.
Which one depends on the texts alone. A question that contains ``<image>`` says itself where its image stands.
"""

from __future__ import annotations

import ast
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final, NamedTuple, TypeAlias

from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.data.json_schema import FIELDS_QUESTION, write_fields
from llavar_peft.data.record_images import image_keys, type_name

_QUESTION: Final = "question"
_ANSWER: Final = "answer"
_IMAGE: Final = "image"
_ID: Final = "id"
NAMES: Final[dict[str, tuple[str, ...]]] = {
    _ID: ("id",),
    _IMAGE: (
        "image", "images", "image_url", "image_path", "img", "img_path", "file_name", "filename", "imgname",
    ),
    _QUESTION: ("question", "questions", "query", "prompt"),
    _ANSWER: (
        "answer", "answers", "label", "labels", "response", "multiple_choice_answer", "ground_truth",
        "gt_parse",
    ),
}  # fmt: skip
"""The roles of a row's columns, each with the names that the column may have; the first that is not null is used."""

_CONVERSATION_COLUMNS: Final = ("conversations", "messages", "texts")
"""Columns that hold a conversation by themselves."""
_CONSUMED_COLUMNS: Final = frozenset({*_CONVERSATION_COLUMNS, *NAMES[_IMAGE], *NAMES[_QUESTION], *NAMES[_ANSWER]})
"""Columns that become the conversation; the others of a row are kept."""
_FIELD_COLUMNS: Final = ("ground_truth", "gt_parse")
"""Columns whose JSON is the answer, and that need no question."""
_VARIANT_COLUMNS: Final = ("answers", "label", "labels")
"""Columns that hold several answers, which tables of text write as a list in a cell."""
_CHOICE_COLUMNS: Final = ("choices", "options")
_IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
_MOST_LISTED: Final = 8  # names of columns in a message
_LONGEST_LIST: Final = 20_000  # characters of a list of answers in a cell

_Pair: TypeAlias = "tuple[str, str | None]"
"""A question and its answer; None for a question that is not answered."""


class _Problem(NamedTuple):
    """What is wrong with a row, and the fix."""

    what: str
    fix: str


def with_conversation(raw: Any) -> Any:
    """Return a row with its conversation under ``conversations``; anything else, or a faulty row, unchanged."""
    if type(raw) is not dict or raw.get("conversations") is not None or raw.get("messages") is not None:
        return raw
    row = _read_row(raw)
    return raw if isinstance(row, _Problem) else row


def explain_row(raw: Mapping[str, Any]) -> tuple[str, str]:
    """Return what is wrong with a row that ``with_conversation`` cannot read, and the fix."""
    row = _read_row(raw)
    return row if isinstance(row, _Problem) else _Problem("has no 'conversations'", "correct the record")


def explain_columns(names: Iterable[str]) -> tuple[str, str] | None:
    """Return which column a table lacks, and the fix; None if it has those of a conversation.

    Args:
        names: The names of the columns.
    """
    columns = list(names)
    if any(name in columns for name in (*_CONVERSATION_COLUMNS, *_FIELD_COLUMNS)):
        return None
    for role in (_QUESTION, _ANSWER):
        if not any(name in columns for name in NAMES[role]):
            return _missing_column(role, columns)
    return None


def _missing_column(role: str, columns: Sequence[str]) -> _Problem:
    """Return the problem of a row or a table without a question or an answer."""
    expected = ", ".join(map(repr, NAMES[role][:3]))
    listed = ", ".join(repr(name[:40]) for name in columns[:_MOST_LISTED]) or "none"
    more = ", ..." if len(columns) > _MOST_LISTED else ""
    what = f"has no '{role}' and no 'conversations' (got {listed}{more}; expected {expected} or another name of it)"
    if role == _QUESTION and not any(name in columns for name in NAMES[_ANSWER]):
        what = f"has no 'conversations', and no question and answer (got {listed}{more})"
        if similar := get_close_matches("conversations", columns, n=1):
            return _Problem(what, f"rename {similar[0]!r} to 'conversations'")
        example = '"conversations": [{"from": "human", "value": "..."}, ...]'
        rename = "--columns question=NAME --columns answer=NAME, in a recipe columns: {question: NAME, answer: NAME}"
        return _Problem(what, f"add {example}, or name the columns: {rename}")
    other_columns = [name for name in columns if name and not _has_role(name)]
    example = next(iter(get_close_matches(role, other_columns, n=1, cutoff=0.3) or other_columns), "NAME")
    return _Problem(what, _rename_fix(role, example))


def _has_role(column: str) -> bool:
    """Return whether a column's name is one of those that rows are read by."""
    return any(column in names for names in NAMES.values())


def _rename_fix(role: str, column: str) -> str:
    """Return the fix for a table whose column has a name that is not known."""
    column = column[:40]
    return f"rename the column, or name it: --columns {role}={column}, in a recipe columns: {{{role}: {column}}}"


def _find_column(raw: Mapping[str, Any], role: str) -> str | None:
    """Return the name of the column that holds a role of a row; None if the row has none."""
    for name in NAMES[role]:
        if raw.get(name) is not None:
            return name
    return None


def _read_row(raw: Mapping[str, Any]) -> dict[str, Any] | _Problem:
    """Return a row with its question and answer as a conversation."""
    images = _read_images(raw)
    if isinstance(images, _Problem):
        return images
    pairs = _read_pairs(raw) if raw.get("texts") is None else _read_texts(raw["texts"])
    if isinstance(pairs, _Problem):
        return pairs
    turns = []
    for number, (question, answer) in enumerate(pairs):
        text = question if number else _with_image_places(question, answer, pairs, _count_images(images))
        turns.append({"from": "human", "value": text})
        if answer is not None:
            turns.append({"from": "gpt", "value": answer})
    row = {name: value for name, value in raw.items() if name not in _CONSUMED_COLUMNS}
    if images is not None:
        row["images" if isinstance(images, list | tuple) else "image"] = images
    return {**row, "conversations": turns}


def _read_images(raw: Mapping[str, Any]) -> Any:
    """Return the value of the column with a row's image or images; None for a row of text."""
    keys = image_keys(raw)
    if len(keys) > 1:
        return _Problem(f"names images under {keys[0]!r} and under {keys[1]!r}", "keep one of the columns")
    if not keys:
        keys = [name for name in NAMES[_IMAGE][3:] if raw.get(name) is not None]
    return raw[keys[0]] if keys else unnamed_image(raw)


def unnamed_image(raw: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return which column of a row seems to be its image although none is named as one, and the fix."""
    if raw.get("conversations") is not None or raw.get("messages") is not None:
        return None
    if any(name in raw for name in NAMES[_IMAGE]):
        return None
    for column, value in raw.items():
        if _looks_like_image(value) and not _has_role(column):
            what = f"{str(column)[:40]!r} seems to be the image, but no column is named as one (such as 'image')"
            return _Problem(what, _rename_fix(_IMAGE, str(column)))
    return None


def _looks_like_image(value: Any) -> bool:
    """Return whether a cell holds the bytes of a file, as a table of images does, or the name of an image file."""
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes | memoryview)
    if isinstance(value, str):
        return len(value) < 1024 and value.lower().endswith(_IMAGE_SUFFIXES) and " " not in value.strip()
    return isinstance(value, bytes | memoryview)


def _count_images(images: Any) -> int:
    return len(images) if isinstance(images, list | tuple) else int(images is not None)


def _with_image_places(question: str, answer: str | None, pairs: Sequence[_Pair], images: int) -> str:
    """Return the first question with ``<image>`` for each image, before or after its text."""
    if not images or any(IMAGE_PLACEHOLDER in text for text, _ in pairs):
        return question
    places = "\n".join([IMAGE_PLACEHOLDER] * images)
    image_first = zlib.crc32(f"{question}\0{answer}".encode("utf-8", "surrogatepass")) & 1
    return f"{places}\n{question}" if image_first else f"{question}\n{places}"


def _read_texts(texts: Any) -> list[_Pair] | _Problem:
    """Return the questions and answers in the column ``texts``."""
    listed = texts if isinstance(texts, list | tuple) else [texts]
    pairs: list[_Pair] = []
    for number, text in enumerate(listed):
        user, assistant = (text.get("user"), text.get("assistant")) if isinstance(text, Mapping) else (None, None)
        if not isinstance(user, str) or not (assistant is None or isinstance(assistant, str)):
            what = f"texts[{number}] is no pair of texts (got {type_name(text)})"
            return _Problem(what, 'write it as {"user": "...", "assistant": "..."}')
        pairs.append((user, assistant))
    return pairs or _Problem("'texts' is empty", "remove the record")


def _read_pairs(raw: Mapping[str, Any]) -> list[_Pair] | _Problem:
    """Return a row's questions, each with its answer; None for one that is not answered."""
    question_column, answer_column = _find_column(raw, _QUESTION), _find_column(raw, _ANSWER)
    fields = _read_fields(raw, answer_column)
    if isinstance(fields, _Problem | list):
        return fields
    if fields is not None and question_column is None:
        return [(FIELDS_QUESTION, fields)]
    problem = _find_problem(raw, question_column, answer_column)
    if problem is not None or question_column is None:
        return problem or _missing_column(_QUESTION, [*map(str, raw)])
    question = raw[question_column]
    if isinstance(question, list | tuple):
        answers = raw.get(answer_column) if answer_column else None
        return _read_lists(question_column, question, answer_column, answers)
    text = _as_text(question)
    if text is None or not text.strip():
        what = f"{question_column!r} is {'empty' if text is not None else f'no text (got {type_name(question)})'}"
        fix = "write the question, or remove the row"
        if isinstance(question, Mapping) and question:
            fix = _rename_fix(_QUESTION, f"{question_column}.{next(iter(question))}")
        return _Problem(what, fix)
    if fields is not None:
        return [(text, fields)]
    answer = _choose_answer(answer_column, None if answer_column is None else raw[answer_column])
    return answer if isinstance(answer, _Problem) else [(text, answer)]


def _find_problem(raw: Mapping[str, Any], question_column: str | None, answer_column: str | None) -> _Problem | None:
    """Return what a row lacks or has too much of, apart from the values of its question and answer."""
    if question_column is None:
        empty = next((name for name in NAMES[_QUESTION] if name in raw), None)
        return None if empty is None else _Problem(f"{empty!r} is empty", "write the question, or remove the row")
    for name in _CHOICE_COLUMNS:
        if isinstance(raw.get(name), list | tuple) and len(raw[name]) > 1:
            what = f"has choices under {name!r}, which the model would not see"
            return _Problem(what, "write the choices into the question, and the right one as the answer")
    if answer_column is None and not any(name in raw for name in NAMES[_ANSWER]):
        return _missing_column(_ANSWER, [*map(str, raw)])
    return None


def _read_lists(
    question_column: str, questions: Sequence[Any], answer_column: str | None, answers: Any
) -> list[_Pair] | _Problem:
    """Return the questions of a row that has a list of them, with the answers of the list beside it."""
    if not isinstance(answers, list | tuple) or len(answers) != len(questions) or not questions:
        got = f"{len(answers)} answers" if isinstance(answers, list | tuple) else type_name(answers)
        what = (
            f"{question_column!r} is a list, and {str(answer_column)!r} does not fit (got {len(questions)} questions "
            f"and {got})"
        )
        return _Problem(what, "give one answer for each question")
    pairs: list[_Pair] = []
    for number, (question, raw_answer) in enumerate(zip(questions, answers, strict=True)):
        text, answer = _as_text(question), _choose_answer(f"{answer_column}[{number}]", raw_answer)
        if text is None or not text.strip():
            what = f"{question_column}[{number}] is no text (got {type_name(question)})"
            return _Problem(what, "write the question")
        if isinstance(answer, _Problem):
            return answer
        pairs.append((text, answer))
    return pairs


def _choose_answer(column: str | None, raw_answer: Any) -> str | _Problem | None:
    """Return an answer; of a list of them the most frequent one, and the first of equally frequent ones."""
    value = raw_answer
    if isinstance(raw_answer, str):
        if column not in _VARIANT_COLUMNS or not raw_answer.startswith("["):
            return raw_answer
        value = _list_in_cell(raw_answer)
    texts: list[str] = []
    for variant in value if isinstance(value, list | tuple) else [value]:
        if variant is None:
            continue
        text = _as_text(variant.get("answer") if isinstance(variant, Mapping) else variant)
        if text is None:
            return _Problem(f"{column!r} holds no text (got {type_name(raw_answer)})", "write the answer as a text")
        texts.append(text)
    return Counter(texts).most_common(1)[0][0] if texts else None


def _as_text(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else None


def _list_in_cell(text: str) -> Any:
    """Return the list that a cell of a text table holds, in JSON or as Python prints it; other text unchanged."""
    if len(text) > _LONGEST_LIST:
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, list):
            return value
    return text


def _read_fields(raw: Mapping[str, Any], column: str | None) -> str | list[_Pair] | _Problem | None:
    """Return the JSON of a form's fields, or Donut's list of questions; None if the answer is a text."""
    if column not in _FIELD_COLUMNS:
        return None
    value = raw[column]
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            return _Problem(f"{column!r} is not JSON ({error})"[:200], "correct the JSON")
    elif isinstance(value, Mapping):
        value = _without_nulls(value)  # with which tables fill what a row lacks
    if not isinstance(value, Mapping):
        return None
    entries = value.get("gt_parses")
    if isinstance(entries, list) and entries and all(isinstance(one, Mapping) and "question" in one for one in entries):
        pairs: dict[str, str | None] = {}
        for entry in entries:
            question, answer = _as_text(entry["question"]), _as_text(entry.get("answer"))
            if question is None:
                return _Problem(f"{column!r} has a question that is no text", "write the question as a text")
            pairs.setdefault(question, answer)
        return list(pairs.items())
    return write_fields(value.get("gt_parse", value))


def _without_nulls(value: Any) -> Any:
    """Return a value without the entries of its objects that are null."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list | tuple) else value
