"""Whether an answer rests on what was read.

The rule, whole:

1. Every number of the answer stands in the evidence or in a question, digit for digit.
2. Everything that the answer quotes stands in the evidence, but for a letter in seven: OCR errs, and models fix it.
3. At least one word of four letters or more, or one number, is shared with what an engine read or with the caption; an
   answer that has no such word must stand there as a whole.

The evidence is the engines' texts and the caption. Case, white space and punctuation do not count. The rule is for
languages that put spaces between words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from rapidfuzz import fuzz

QUOTED_ALIKE: Final = 86.0
"""How alike, of 100, a quotation and its place in the evidence must be."""

_NUMBER: Final = re.compile(r"\d+")
_QUOTED: Final = re.compile(r'"([^"]{2,}?)"|“([^”]{2,}?)”|«([^»]{2,}?)»')
_WORD: Final = re.compile(r"\w{4,}")
_NO_WORD: Final = re.compile(r"[\W_]+")


def find_ungrounded(answer: str, evidence: Sequence[str], questions: Sequence[str] = ()) -> str | None:
    """Look for what an answer says and nobody read.

    Args:
        answer: The answer.
        evidence: The engines' texts and the caption.
        questions: Asked so far; a number may come from them.

    Returns:
        What is wrong, for the model and for people; None where the answer rests on the evidence.
    """
    read = _plain(" ".join(evidence))
    numbers = {*_NUMBER.findall(" ".join((*evidence, *questions)))}
    for number in _NUMBER.findall(answer):
        if number not in numbers:
            return f"the number {number} is not in the text that was read"
    for groups in _QUOTED.findall(answer):
        quoted = _plain("".join(groups))
        if quoted and fuzz.partial_ratio(quoted, read, score_cutoff=QUOTED_ALIKE) < QUOTED_ALIKE:
            return f'"{quoted}" is quoted and is not in the text that was read'
    words = {*_WORD.findall(_plain(answer)), *_NUMBER.findall(answer)}
    shared = words & {*read.split(), *numbers} if words else {_plain(answer)} if _plain(answer) in read else set()
    return None if shared else "no word of it is in the text that was read"


def _plain(text: str) -> str:
    return " ".join(_NO_WORD.sub(" ", text.casefold()).split())
