"""Reading a judge's two scores, its refusal, or neither: a score that is wrong is worse than one asked for again."""

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
"""Of labels and scores (a dot): which score is whose is plain in these alone."""


def parse_scores(reply: str) -> Scores | None:
    """Read the two scores that a judge was told to begin with.

    ``8 9``, ``8, 9.5``, ``8/10 9/10``, ``**8 9**`` and ``Assistant 1: 8, Assistant 2: 9`` are, on one line or on two,
    in a list, in a fence, or below a heading that names scores. Numbers within a sentence are not, nor what lies
    outside the scale, nor scores in the wrong order, nor anything that two readers could read in two ways. Scores with
    words behind them on their line (``8 9 Both are good``) are not either: the judge was told to give them a line of
    their own, and the original refuses such a line too. The judge is asked again.

    Args:
        reply: The judge's words.

    Returns:
        The first and the second score, or None.

    Source: LLaVA, eval_gpt_review_visual.py, parse_score.
    """
    lines = [line for line in reply.splitlines() if any(map(str.isalnum, line)) and not line.strip().startswith("```")]
    if lines and _HEADING.match(lines[0]):
        del lines[0]
    order, numbers = "", list[float]()
    for line in lines:
        tokens = _tokens(line)
        if tokens is None or (len(numbers) == 2 and not any(number for _, number in tokens)):  # the reasons begin
            break
        for label, number in tokens:
            order += label or "."
            numbers += [float(number)] if number else []
    if order not in _ORDERS or max(numbers) > _HIGHEST:
        return None
    return numbers[0], numbers[1]


def is_refusal(reply: str) -> bool:
    """Whether a judge says in plain words that it will not judge.

    Args:
        reply: The judge's words, in which there are no scores.

    Returns:
        Whether they begin as refusals do.
    """
    return _REFUSAL.match(reply) is not None


def _tokens(line: str) -> list[tuple[str, str]] | None:
    """The labels and the numbers of a line that holds nothing else, each as (label, number); else None."""
    listed = _LISTED.match(line)
    rest = line[listed.end() :] if listed else line
    found = [(one[1] or "", one[2] or "") for one in _TOKEN.finditer(_OUT_OF.sub("", rest))]
    if any(map(str.isalnum, _FILLERS.sub("", _TOKEN.sub("", _OUT_OF.sub("", rest))))):
        return None
    if listed is None:
        return found
    # A list's own number is a label, where what it lists has none.
    return found if _LABEL.search(rest) else [(listed[1], ""), *found]
