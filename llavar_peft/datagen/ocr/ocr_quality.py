"""Quality filter: decides whether an image's text is good enough for training, with the first reason against it."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from rapidfuzz.distance import Levenshtein

from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.datagen.ocr.merge_paragraphs import merge_lines
from llavar_peft.datagen.ocr.ocr_lines import OcrLine, letter_count

Reason = Literal[
    "pages_left_out",
    "broken_image",
    "engine_failed",
    "blank_page",
    "no_text",
    "low_confidence",
    "few_letters",
    "other_script",
    "reserved_text",
    "engines_disagree",
    "duplicate",
]
"""Why an image was dropped, in the order of the checks."""


@dataclass(frozen=True, kw_only=True)
class QualityLimits:
    """Minimum quality of an image's text.

    Attributes:
        min_confidence: Lines below it are left out; if they contain half of the letters, the image is dropped.
        min_letters: Minimum number of letters and digits that remain.
        script: Required Unicode script in capitals, for example ``"LATIN"``; None for any.
        min_script_share: Minimum fraction of letters in that script; digits do not count.
        max_disagreement: Maximum character error rate between two engines, if both have read.
    """

    min_confidence: float = 0.5
    min_letters: int = 5
    script: str | None = None
    min_script_share: float = 0.8
    max_disagreement: float = 0.3


@dataclass(frozen=True, slots=True)
class QualityVerdict:
    """Result of the quality filter for one image.

    Attributes:
        text: The confident lines as paragraphs, one per line.
        lines: Number of these lines.
        left_out: Number of lines below the minimum confidence.
        reason: Why the image is dropped; None if it is kept.
        detail: The figure behind the reason, for people.
    """

    text: str
    lines: int
    left_out: int
    reason: Reason | None = None
    detail: str = ""


def transcribe(lines: Sequence[OcrLine]) -> str:
    """Return a page's text: its paragraphs in reading order, one per line."""
    return "\n".join(paragraph.text for paragraph in merge_lines(lines))


def judge_quality(
    lines: Sequence[OcrLine], limits: QualityLimits, second: Sequence[OcrLine] | None = None
) -> QualityVerdict:
    """Return an image's text and the first reason against keeping it.

    Args:
        second: Another engine's lines to compare with; those below the minimum confidence are left out too.
    """
    good = confident(lines, limits)
    text = transcribe(good)
    reason, detail = _find_fault(lines, text, limits)
    if reason is None and second is not None:
        differing = disagreement(text, transcribe(confident(second, limits)))
        if differing > limits.max_disagreement:
            reason, detail = "engines_disagree", f"character error rate {differing:.2f}"
    return QualityVerdict(text, len(good), len(lines) - len(good), reason, detail)


def _find_fault(lines: Sequence[OcrLine], text: str, limits: QualityLimits) -> tuple[Reason | None, str]:
    seen = sum(letter_count(line.text) for line in lines)
    if not seen:
        return "no_text", ""
    letters = letter_count(text)
    if letters <= seen / 2:
        return "low_confidence", f"{letters} of {seen} letters in lines of at least {limits.min_confidence:g}"
    if letters < limits.min_letters:
        return "few_letters", f"{letters} letters"
    share = script_share(text, limits.script) if limits.script else 1.0
    if share < limits.min_script_share:
        return "other_script", f"{share:.0%} {limits.script}"
    if IMAGE_PLACEHOLDER in text:
        return "reserved_text", f"contains {IMAGE_PLACEHOLDER}"
    return None, ""


def confident(lines: Iterable[OcrLine], limits: QualityLimits) -> list[OcrLine]:
    """Return the lines with at least the minimum confidence."""
    return [line for line in lines if line.confidence >= limits.min_confidence]


def disagreement(first: str, second: str) -> float:
    """Return the symmetric character error rate between two readings, without white space.

    It is the number of edits over the length of the longer reading: 0 for equal readings, 1 for unrelated ones.
    """
    return float(Levenshtein.normalized_distance("".join(first.split()), "".join(second.split())))


def script_share(text: str, script: str) -> float:
    """Return the fraction of a text's letters in a script; 1.0 for a text without letters."""
    scripts = script_counts(text)
    total = sum(scripts.values())
    return scripts[script] / total if total else 1.0


def script_counts(text: str) -> Counter[str]:
    """Return the number of letters by script, the first word of their Unicode names: LATIN, CYRILLIC, CJK, ..."""
    return Counter(_script(character) for character in text if character.isalpha())


@lru_cache(maxsize=1 << 14)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]
