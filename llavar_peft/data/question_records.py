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
from typing import Any, Final, NamedTuple

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
"""What a row has, and the names of the columns that may hold it; the first that is there and not null counts."""

_WHOLE: Final = ("conversations", "messages", "texts")
"""Columns that hold a conversation by themselves."""
_USED: Final = frozenset((*_WHOLE, *(name for names in NAMES.values() for name in names))) - {_ID}
_FIELDS: Final = ("ground_truth", "gt_parse")
"""Columns whose JSON is the answer, and that need no question."""
_VARIANTS: Final = ("answers", "label", "labels")
"""Columns that hold several answers, which tables of text write as a list in a cell."""
_CHOICES: Final = ("choices", "options")
_IMAGE_NAMES: Final = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
_MOST_LISTED: Final = 8  # names of columns in a message
_LONGEST_LIST: Final = 20_000  # characters of a list of answers in a cell


class _Problem(NamedTuple):
    """What is wrong with a row, and the fix."""

    what: str
    fix: str


def with_conversation(raw: Any) -> Any:
    """Return a row with its conversation under ``conversations``; anything else, or a faulty row, unchanged."""
    if type(raw) is not dict or raw.get("conversations") is not None or raw.get("messages") is not None:
        return raw
    read = _read_row(raw)
    return raw if isinstance(read, _Problem) else read


def explain_row(raw: Mapping[str, Any]) -> tuple[str, str]:
    """Return what is wrong with a row that ``with_conversation`` cannot read, and the fix."""
    read = _read_row(raw)
    return read if isinstance(read, _Problem) else _Problem("has no 'conversations'", "correct the record")


def explain_columns(names: Iterable[str]) -> tuple[str, str] | None:
    """Return which column a table lacks, and the fix; None if it has those of a conversation.

    Args:
        names: The names of the columns.
    """
    named = list(names)
    if any(name in named for name in (*_WHOLE, *_FIELDS)):
        return None
    for role in (_QUESTION, _ANSWER):
        if not any(name in named for name in NAMES[role]):
            return _missing(role, named)
    return None


def _missing(role: str, named: Sequence[str]) -> _Problem:
    """Return the problem of a row or a table without a question or an answer."""
    expected = ", ".join(map(repr, NAMES[role][:3]))
    found = ", ".join(repr(name[:40]) for name in named[:_MOST_LISTED]) or "none"
    more = ", ..." if len(named) > _MOST_LISTED else ""
    what = f"has no '{role}' and no 'conversations' (got {found}{more}; expected {expected} or another name of it)"
    if role == _QUESTION and not any(name in named for name in NAMES[_ANSWER]):
        what = f"has no 'conversations', and no question and answer (got {found}{more})"
        if similar := get_close_matches("conversations", named, n=1):
            return _Problem(what, f"rename {similar[0]!r} to 'conversations'")
        example = '"conversations": [{"from": "human", "value": "..."}, ...]'
        rename = "--columns question=NAME --columns answer=NAME, in a recipe columns: {question: NAME, answer: NAME}"
        return _Problem(what, f"add {example}, or name the columns: {rename}")
    free = [name for name in named if name and not any(name in known for known in NAMES.values())]
    example = next(iter(get_close_matches(role, free, n=1, cutoff=0.3) or free), "NAME")
    return _Problem(what, _rename(role, example))


def _rename(role: str, column: str) -> str:
    column = column[:40]
    return f"rename the column, or name it: --columns {role}={column}, in a recipe columns: {{{role}: {column}}}"


def _first(raw: Mapping[str, Any], role: str) -> str | None:
    for name in NAMES[role]:
        if raw.get(name) is not None:
            return name
    return None


def _read_row(raw: Mapping[str, Any]) -> dict[str, Any] | _Problem:
    images = _images(raw)
    if isinstance(images, _Problem):
        return images
    pairs = _read_pairs(raw) if raw.get("texts") is None else _read_texts(raw["texts"])
    if isinstance(pairs, _Problem):
        return pairs
    turns = []
    for number, (question, answer) in enumerate(pairs):
        asked = question if number else _place(question, answer, pairs, _count(images))
        turns.append({"from": "human", "value": asked})
        turns += [{"from": "gpt", "value": answer}] if answer is not None else []
    row = {name: value for name, value in raw.items() if name not in _USED}
    if images is not None:
        row["images" if isinstance(images, list | tuple) else "image"] = images
    return {**row, "conversations": turns}


def _images(raw: Mapping[str, Any]) -> Any:
    """Return the value of the column with a row's image or images; None for a row of text."""
    known = image_keys(raw)
    if len(known) > 1:
        return _Problem(f"names images under {known[0]!r} and under {known[1]!r}", "keep one of the columns")
    name = next(iter(known), None) or next((one for one in NAMES[_IMAGE][3:] if raw.get(one) is not None), None)
    if name is not None:
        return raw[name]
    return unnamed_image(raw)


def unnamed_image(raw: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return which column of a row seems to be its image although none is named as one, and the fix."""
    if any(raw.get(name) is not None for name in _WHOLE[:2]) or any(name in raw for name in NAMES[_IMAGE]):
        return None
    for other, value in raw.items():
        if _looks_like_image(value) and not any(other in names for names in NAMES.values()):
            what = f"{str(other)[:40]!r} seems to be the image, but no column is named as one (such as 'image')"
            return _Problem(what, _rename(_IMAGE, str(other)))
    return None


def _looks_like_image(value: Any) -> bool:
    if isinstance(value, Mapping):
        return isinstance(value.get("bytes"), bytes | memoryview)
    if isinstance(value, str):
        return len(value) < 1024 and value.lower().endswith(_IMAGE_NAMES) and " " not in value.strip()
    return isinstance(value, bytes | memoryview)


def _count(images: Any) -> int:
    return len(images) if isinstance(images, list | tuple) else int(images is not None)


def _place(question: str, answer: str | None, pairs: Sequence[tuple[str, str | None]], images: int) -> str:
    """Return the first question with the places of the images."""
    if not images or any(IMAGE_PLACEHOLDER in asked for asked, _ in pairs):
        return question
    places = "\n".join([IMAGE_PLACEHOLDER] * images)
    first = zlib.crc32(f"{question}\0{answer}".encode("utf-8", "surrogatepass")) & 1
    return f"{places}\n{question}" if first else f"{question}\n{places}"


def _read_texts(texts: Any) -> list[tuple[str, str | None]] | _Problem:
    listed = texts if isinstance(texts, list | tuple) else [texts]
    pairs: list[tuple[str, str | None]] = []
    for number, text in enumerate(listed):
        user, assistant = (text.get("user"), text.get("assistant")) if isinstance(text, Mapping) else (None, None)
        if not isinstance(user, str) or not (assistant is None or isinstance(assistant, str)):
            what = f"texts[{number}] is no pair of texts (got {type_name(text)})"
            return _Problem(what, 'write it as {"user": "...", "assistant": "..."}')
        pairs.append((user, assistant))
    return pairs or _Problem("'texts' is empty", "remove the record")


def _read_pairs(raw: Mapping[str, Any]) -> list[tuple[str, str | None]] | _Problem:
    """Return a row's questions, each with its answer; None for one that is not answered."""
    asked, answered = _first(raw, _QUESTION), _first(raw, _ANSWER)
    fields = _read_fields(raw, answered)
    if isinstance(fields, _Problem | list):
        return fields
    if fields is not None and asked is None:
        return [(FIELDS_QUESTION, fields)]
    if (problem := _find_problem(raw, asked, answered)) is not None or asked is None:
        return problem or _missing(_QUESTION, [*map(str, raw)])
    question = raw[asked]
    if isinstance(question, list | tuple):
        return _read_lists(asked, question, answered, raw.get(answered) if answered else None)
    text = _as_text(question)
    if text is None or not text.strip():
        what = f"{asked!r} is {'empty' if text is not None else f'no text (got {type_name(question)})'}"
        inner = next((str(key) for key in question), None) if isinstance(question, Mapping) else None
        fix = "write the question, or remove the row" if inner is None else _rename(_QUESTION, f"{asked}.{inner}")
        return _Problem(what, fix)
    answer = fields if fields is not None else _choose_answer(answered, None if answered is None else raw[answered])
    return answer if isinstance(answer, _Problem) else [(text, answer)]


def _find_problem(raw: Mapping[str, Any], asked: str | None, answered: str | None) -> _Problem | None:
    """Return what a row lacks or has too much of, apart from the values of its question and answer."""
    if asked is None:
        empty = next((name for name in NAMES[_QUESTION] if name in raw), None)
        return None if empty is None else _Problem(f"{empty!r} is empty", "write the question, or remove the row")
    for name in _CHOICES:
        if isinstance(raw.get(name), list | tuple) and len(raw[name]) > 1:
            what = f"has choices under {name!r}, which the model would not see"
            return _Problem(what, "write the choices into the question, and the right one as the answer")
    if answered is None and not any(name in raw for name in NAMES[_ANSWER]):
        return _missing(_ANSWER, [*map(str, raw)])
    return None


def _read_lists(
    asked: str, questions: Sequence[Any], answered: str | None, answers: Any
) -> list[tuple[str, str | None]] | _Problem:
    """Return the questions of a row that has a list of them, with the answers of the list beside it."""
    if not isinstance(answers, list | tuple) or len(answers) != len(questions) or not questions:
        got = f"{len(answers)} answers" if isinstance(answers, list | tuple) else type_name(answers)
        what = f"{asked!r} is a list, and {str(answered)!r} does not fit (got {len(questions)} questions and {got})"
        return _Problem(what, "give one answer for each question")
    pairs: list[tuple[str, str | None]] = []
    for number, (question, given) in enumerate(zip(questions, answers, strict=True)):
        text, answer = _as_text(question), _choose_answer(f"{answered}[{number}]", given)
        if text is None or not text.strip():
            return _Problem(f"{asked}[{number}] is no text (got {type_name(question)})", "write the question")
        if isinstance(answer, _Problem):
            return answer
        pairs.append((text, answer))
    return pairs


def _choose_answer(name: str | None, given: Any) -> str | _Problem | None:
    """Return an answer; of a list of them the most frequent one, and the first of equally frequent ones."""
    value = given
    if isinstance(given, str):
        if name not in _VARIANTS or not given.startswith("["):
            return given
        value = _list_in_cell(given)
    listed = value if isinstance(value, list | tuple) else [value]
    read = [_as_text(one.get("answer") if isinstance(one, Mapping) else one) for one in listed if one is not None]
    texts = [one for one in read if one is not None]
    if len(texts) < len(read):
        return _Problem(f"{name!r} holds no text (got {type_name(given)})", "write the answer as a text")
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
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, list):
            return value
    return text


def _read_fields(raw: Mapping[str, Any], name: str | None) -> str | list[tuple[str, str | None]] | _Problem | None:
    """Return the JSON of a form's fields, or Donut's list of questions; None if the answer is a text."""
    if name not in _FIELDS:
        return None
    value = raw[name]
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            return _Problem(f"{name!r} is not JSON ({error})"[:200], "correct the JSON")
    elif isinstance(value, Mapping):
        value = _without_nulls(value)  # with which tables fill what a row lacks
    if not isinstance(value, Mapping):
        return None
    asked = value.get("gt_parses")
    if isinstance(asked, list) and asked and all(isinstance(one, Mapping) and "question" in one for one in asked):
        pairs: dict[str, str | None] = {}
        for one in asked:
            question, answer = _as_text(one["question"]), _as_text(one.get("answer"))
            if question is None:
                return _Problem(f"{name!r} has a question that is no text", "write the question as a text")
            pairs.setdefault(question, answer)
        return list(pairs.items())
    return write_fields(value.get("gt_parse", value))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list | tuple) else value
