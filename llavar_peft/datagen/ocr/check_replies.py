"""From what a language model wrote to turns that may be trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.datagen.ocr.answer_grounding import find_ungrounded

Pair: TypeAlias = tuple[str, str]

_ROLE: Final = re.compile(
    r"^\s*\**(?:question|answer|user|human|assistant|gpt|q|a)\s*\d*\**\s*[:.]\**\s*", re.IGNORECASE
)
_PLAIN: Final = re.compile(
    r"^\W*(?:question|q)\s*\d*\W*:[\s*]*(.+?)^\W*(?:answer|a)\s*\d*\W*:[\s*]*(.+?)(?=^\W*(?:question|q)\s*\d*\W*:|\Z)",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
_TELLTALE: Final = re.compile(r"\b(?:ocr|caption(?:ed|s)?|recogni[sz]ed text)\b", re.IGNORECASE)
"""Words that give away that the model was shown text, not an image."""


@dataclass(frozen=True, slots=True)
class CheckedReply:
    """A reply, taken apart.

    Attributes:
        turns: Questions with their answers that are sound.
        faults: What is wrong with the others, or with the whole.
        understood: Whether there were turns in it at all.
    """

    turns: tuple[Pair, ...]
    faults: tuple[str, ...]
    understood: bool


def check_reply(reply: str, evidence: Sequence[str]) -> CheckedReply:
    """Take a reply apart, mends its form and holds each turn to the evidence.

    Args:
        reply: What the model wrote; wanted is ``{"turns": [{"question": ..., "answer": ...}, ...]}``. Text around it,
            a code fence, a bare list and plain ``Question: ... Answer: ...`` are understood too.
        evidence: The engines' texts and the caption.

    Returns:
        The sound turns, in order, and what is wrong with the rest.
    """
    pairs = _json_pairs(reply) or [(question, answer) for question, answer in _PLAIN.findall(reply)]
    if not pairs:
        return CheckedReply((), ("there is no list of questions and answers in it",), understood=False)
    turns, faults = list[Pair](), list[str]()
    for number, (question, answer) in enumerate(((_repaired(asked), _repaired(said)) for asked, said in pairs), 1):
        fault = _fault(question, answer, evidence, turns)
        if fault is None:
            turns.append((question, answer))
        else:
            faults.append(f"turn {number}: {fault}")
    return CheckedReply(tuple(turns), tuple(faults), understood=True)


def _fault(question: str, answer: str, evidence: Sequence[str], before: Sequence[Pair]) -> str | None:
    if not question or not answer:
        return "it is empty"
    if any(question.casefold() == asked.casefold() for asked, _ in before):
        return "it asks the same again"
    telltale = _TELLTALE.search(f"{question} {answer}")
    if telltale and telltale[0].casefold() not in " ".join(evidence).casefold():
        return f"it speaks of {telltale[0]!r}, which nobody who sees the picture would"
    return find_ungrounded(answer, evidence, [question, *(asked for asked, _ in before)])


def _repaired(text: str) -> str:
    return _ROLE.sub("", text.replace(IMAGE_PLACEHOLDER, "")).strip()


def _json_pairs(reply: str) -> list[Pair]:
    """The first JSON value in the reply that holds turns."""
    decoder = json.JSONDecoder(strict=False)  # line breaks inside strings are common, and harmless
    for start in re.finditer(r"[\[{]", reply):
        try:
            value, _ = decoder.raw_decode(reply, start.start())
        except (ValueError, RecursionError):
            continue
        pairs = _pairs(value.get("turns") if isinstance(value, dict) else value)
        if pairs:
            return pairs
    return []


def _pairs(turns: Any) -> list[Pair]:
    if not isinstance(turns, list):
        return []
    return [
        (turn["question"], turn["answer"])
        for turn in turns
        if isinstance(turn, dict) and isinstance(turn.get("question"), str) and isinstance(turn.get("answer"), str)
    ]
