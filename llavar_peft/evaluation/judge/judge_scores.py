"""Parse a judge's two scores strictly: a wrong score is worse than asking the judge again."""

from __future__ import annotations

import re
from typing import Final

from llavar_peft.evaluation.judge.judge_reviews import Scores

_NAMED: Final = r"\b(?:assistant|answer|response|model)\s*#?\s*([12])\b(?:['\u2019]s\b)?"
_LISTED: Final = re.compile(r"^[^\w-]*([12])[.):]\s+(?=\S)")
_NUMBER: Final = r"(?<![\w.-])\d+(?:\.\d+)?(?!\w)"
_TOKEN: Final = re.compile(f"{_NAMED}|({_NUMBER})", re.IGNORECASE)
_LABEL: Final = re.compile(_NAMED, re.IGNORECASE)
_OUT_OF: Final = re.compile(r"\s*(?:/|\bout of\b)\s*10\b(?!\.\d)", re.IGNORECASE)
_FILLERS: Final = re.compile(r"\b(?:scores?|ratings?|points?|and|for|of|is|are|the|tuple)\b", re.IGNORECASE)
_HEADING: Final = re.compile(r"^\D*\b(?:scores?|ratings?)\b\D*:\W*$", re.IGNORECASE)
_REFUSAL: Final = re.compile(
    r"^\W*(?:(?:i['\u2019]m|i am|we['\u2019]re|we are)\s+(?:very\s+|so\s+)?(?:sorry|unable|not able|afraid)\b|sorry\b|"
    r"(?:i|we)\s+(?:cannot|can['\u2019]t|can not|won['\u2019]t|must decline)\b|unfortunately\W+(?:i|we)\b|"
    r"as an ai\b|my apologies\b|i apologi[sz]e\b)",
    re.IGNORECASE,
)
_HIGHEST: Final = 10
_ORDERS: Final = frozenset({"..", "1.2.", ".1.2", "12.."})
"""Unambiguous orders of labels and scores, with a dot for each score."""


def parse_scores(reply: str) -> Scores | None:
    """Return the first and the second score at the beginning of a reply, or None.

    Accepted forms are ``8 9``, ``8, 9.5``, ``8/10 9/10``, ``**8 9**`` and ``Assistant 1: 8, Assistant 2: 9``, on one
    line or two, in a list, in a code fence, or below a heading that mentions scores. Rejected are numbers inside a
    sentence, numbers outside the scale, scores in the wrong order, anything ambiguous, and scores followed by text on
    the same line (``8 9 Both are good``), which the original rejects too.

    Source: LLaVA, eval_gpt_review_visual.py, parse_score.
    """
    lines = [line for line in reply.splitlines() if any(map(str.isalnum, line)) and not line.strip().startswith("```")]
    if lines and _HEADING.match(lines[0]):
        del lines[0]
    order, numbers = "", list[float]()
    for line in lines:
        tokens = _tokens(line)
        if tokens is None or (len(numbers) == 2 and not any(number for _, number in tokens)):  # the explanation begins
            break
        for label, number in tokens:
            order += label or "."
            numbers += [float(number)] if number else []
    if order not in _ORDERS or max(numbers) > _HIGHEST:
        return None
    return numbers[0], numbers[1]


def is_refusal(reply: str) -> bool:
    """Return whether a reply without scores begins as a refusal does."""
    return _REFUSAL.match(reply) is not None


def _tokens(line: str) -> list[tuple[str, str]] | None:
    """Return the labels and numbers of a line as (label, number) pairs; None if it contains anything else."""
    listed = _LISTED.match(line)
    rest = line[listed.end() :] if listed else line
    found = [(one[1] or "", one[2] or "") for one in _TOKEN.finditer(_OUT_OF.sub("", rest))]
    if any(map(str.isalnum, _FILLERS.sub("", _TOKEN.sub("", _OUT_OF.sub("", rest))))):
        return None
    if listed is None:
        return found
    # The number of a list item is a label unless the item has one.
    return found if _LABEL.search(rest) else [(listed[1], ""), *found]
