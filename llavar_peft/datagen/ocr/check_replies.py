"""Extract question-and-answer turns from a language model's reply, and check them against the text that was read.

An answer is grounded if all of this holds:

1. Every number in it is in the evidence or in a question, digit for digit.
2. Every quotation in it is in the evidence, up to one letter in seven, because OCR errs and models correct it.
3. It shares at least one word of four letters or more, or one number, with the evidence. An answer without such a word
   must be in the evidence as a whole.

The evidence is the engines' texts and the caption. Case, white space and punctuation are ignored. The rule applies to
languages that put spaces between words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from rapidfuzz import fuzz

from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.data.json_schema import AnswerSchema, subschemas

Pair: TypeAlias = tuple[str, str]

QUOTED_ALIKE: Final = 86.0
"""Minimum similarity, of 100, of a quotation and its counterpart in the evidence."""

_ROLE: Final = re.compile(
    r"^\s*\**(?:question|answer|user|human|assistant|gpt|q|a)\s*\d*\**\s*[:.]\**\s*", re.IGNORECASE
)
_PLAIN: Final = re.compile(
    r"^\W*(?:question|q)\s*\d*\W*:[\s*]*(.+?)^\W*(?:answer|a)\s*\d*\W*:[\s*]*(.+?)(?=^\W*(?:question|q)\s*\d*\W*:|\Z)",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
_TELLTALE: Final = re.compile(r"\b(?:ocr|caption(?:ed|s)?|recogni[sz]ed text)\b", re.IGNORECASE)
"""Words that reveal that the model was given text instead of an image."""
_NUMBER: Final = re.compile(r"\d+")
_QUOTED: Final = re.compile(r'"([^"]{2,}?)"|“([^”]{2,}?)”|«([^»]{2,}?)»')
_WORD: Final = re.compile(r"\w{4,}")
_NO_WORD: Final = re.compile(r"[\W_]+")


@dataclass(frozen=True, slots=True)
class CheckedReply:
    """The turns of a reply.

    Attributes:
        turns: Valid questions with their answers.
        faults: What is wrong with the other turns, or with the reply as a whole.
        understood: Whether the reply contained turns at all.
    """

    turns: tuple[Pair, ...]
    faults: tuple[str, ...]
    understood: bool


def check_reply(reply: str, evidence: Sequence[str]) -> CheckedReply:
    """Return the valid turns of a reply in order, and the faults of the others.

    Args:
        reply: Expected is ``{"turns": [{"question": ..., "answer": ...}, ...]}``. Text around it, a code fence, a bare
            list and plain ``Question: ... Answer: ...`` are accepted too.
        evidence: The engines' texts and the caption.
    """
    pairs = _json_pairs(reply) or [(question, answer) for question, answer in _PLAIN.findall(reply)]
    if not pairs:
        return CheckedReply((), ("there is no list of questions and answers in it",), understood=False)
    turns, faults = list[Pair](), list[str]()
    for number, (question, answer) in enumerate(((_clean(first), _clean(second)) for first, second in pairs), 1):
        fault = _find_fault(question, answer, evidence, turns)
        if fault is None:
            turns.append((question, answer))
        else:
            faults.append(f"turn {number}: {fault}")
    return CheckedReply(tuple(turns), tuple(faults), understood=True)


def check_fields(reply: str, schema: AnswerSchema, evidence: Sequence[str]) -> tuple[Any, str | None, bool]:
    """Read a form's fields from a reply, and check them against their schema and the text that was read.

    Args:
        reply: Expected is JSON; text around it and a code fence are accepted too.
        schema: What the fields have to follow.
        evidence: The engines' texts and the caption.

    Returns:
        The fields in the schema's order; what is wrong with them, None if nothing is; and whether they follow the
        schema.
    """
    found = [value for value in _json_values(reply) if isinstance(value, dict | list)]
    if not found:
        return None, "there is no JSON in it", False
    if problem := schema.problem(found[0]):
        return None, f"it does not follow the schema: {problem}", False
    chosen = {str(one) for _, part in subschemas(schema.definition) for one in part.get("enum", [part.get("const")])}
    for leaf in _leaves(found[0]):
        # 12.5 may be printed as 12.50.
        forms = [leaf] if isinstance(leaf, str) else [str(leaf), f"{leaf:.2f}"]
        faults = [find_ungrounded(one, evidence) for one in forms if one not in chosen and one.strip()]
        if faults and all(faults):
            return None, f"{str(leaf)[:80]!r}: {faults[0]}", True
    return schema.ordered(found[0]), None, True


def _leaves(value: Any) -> Iterator[str | int | float]:
    """Yield the texts and numbers of a value."""
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield value


def _find_fault(question: str, answer: str, evidence: Sequence[str], before: Sequence[Pair]) -> str | None:
    """Return what is wrong with a turn. The text is sent to the model, and replies are kept by the hash of it."""
    if not question or not answer:
        return "it is empty"
    if any(question.casefold() == asked.casefold() for asked, _ in before):
        return "it asks the same again"
    telltale = _TELLTALE.search(f"{question} {answer}")
    if telltale and telltale[0].casefold() not in " ".join(evidence).casefold():
        return f"it speaks of {telltale[0]!r}, which nobody who sees the picture would"
    return find_ungrounded(answer, evidence, [question, *(asked for asked, _ in before)])


def _clean(text: str) -> str:
    return _ROLE.sub("", text.replace(IMAGE_PLACEHOLDER, "")).strip()


def _json_pairs(reply: str) -> list[Pair]:
    """Return the turns of the first JSON value in the reply that contains any."""
    for value in _json_values(reply):
        pairs = _pairs(value.get("turns") if isinstance(value, dict) else value)
        if pairs:
            return pairs
    return []


def _json_values(reply: str) -> Iterator[Any]:
    """Yield the lists and objects in a reply, each before those within it."""
    decoder = json.JSONDecoder(strict=False)  # line breaks inside strings are common and harmless
    for start in re.finditer(r"[\[{]", reply):
        try:
            yield decoder.raw_decode(reply, start.start())[0]
        except (ValueError, RecursionError):
            continue


def _pairs(turns: Any) -> list[Pair]:
    if not isinstance(turns, list):
        return []
    return [
        (turn["question"], turn["answer"])
        for turn in turns
        if isinstance(turn, dict) and isinstance(turn.get("question"), str) and isinstance(turn.get("answer"), str)
    ]


def find_ungrounded(answer: str, evidence: Sequence[str], questions: Sequence[str] = ()) -> str | None:
    """Return what an answer claims without evidence, None if it is grounded.

    Args:
        answer: The answer.
        evidence: The engines' texts and the caption.
        questions: Questions so far, from which numbers may be taken.
    """
    read = _normalize(" ".join(evidence))
    numbers = {*_NUMBER.findall(" ".join((*evidence, *questions)))}
    for number in _NUMBER.findall(answer):
        if number not in numbers:
            return f"the number {number} is not in the text that was read"
    for groups in _QUOTED.findall(answer):
        quoted = _normalize("".join(groups))
        if quoted and fuzz.partial_ratio(quoted, read, score_cutoff=QUOTED_ALIKE) < QUOTED_ALIKE:
            return f'"{quoted}" is quoted and is not in the text that was read'
    plain = _normalize(answer)
    words = {*_WORD.findall(plain), *_NUMBER.findall(answer)}
    grounded = bool(words & {*read.split(), *numbers}) if words else plain in read
    return None if grounded else "no word of it is in the text that was read"


def _normalize(text: str) -> str:
    return " ".join(_NO_WORD.sub(" ", text.casefold()).split())
