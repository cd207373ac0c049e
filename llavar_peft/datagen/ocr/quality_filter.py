"""What is good enough to be learnt from. Each image that is not gets the first reason that holds."""

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
"""Why an image became no record, in the order in which it is asked."""


@dataclass(frozen=True, kw_only=True)
class QualityLimits:
    """What an image must reach to become a record.

    Attributes:
        min_confidence: Lines below it are left out; where they hold half of the letters, the whole image is.
        min_letters: Letters and digits that must be left.
        script: Of Unicode, in capitals, e.g. ``"LATIN"``; None takes any.
        min_script_share: Share of the letters that must be of that script; digits count as of every script.
        max_disagreement: Character error rate at most between two engines, where both have read.
    """

    min_confidence: float = 0.5
    min_letters: int = 5
    script: str | None = None
    min_script_share: float = 0.8
    max_disagreement: float = 0.3


@dataclass(frozen=True, slots=True)
class QualityVerdict:
    """What became of an image's text.

    Attributes:
        text: Paragraphs, one a line, of the lines that were good enough.
        lines: How many these are.
        left_out: How many lines were not good enough.
        reason: Why the image is dropped; None where it is kept.
        detail: The figure behind the reason, for people.
    """

    text: str
    lines: int
    left_out: int
    reason: Reason | None = None
    detail: str = ""


def transcribe(lines: Sequence[OcrLine]) -> str:
    """A page's text: paragraphs in reading order, one a line."""
    return "\n".join(paragraph.text for paragraph in merge_lines(lines))


def judge_quality(
    lines: Sequence[OcrLine], limits: QualityLimits, second: Sequence[OcrLine] | None = None
) -> QualityVerdict:
    """Decides whether an image's text is good enough.

    Args:
        lines: What the engine saw.
        limits: What is asked for.
        second: What another engine saw, to compare; its own weak lines are left out too.

    Returns:
        The text, and the first reason against it.
    """
    good = confident(lines, limits)
    text = transcribe(good)
    reason, detail = _fault(lines, text, limits)
    if reason is None and second is not None:
        differing = disagreement(text, transcribe(confident(second, limits)))
        if differing > limits.max_disagreement:
            reason, detail = "engines_disagree", f"character error rate {differing:.2f}"
    return QualityVerdict(text, len(good), len(lines) - len(good), reason, detail)


def _fault(lines: Sequence[OcrLine], text: str, limits: QualityLimits) -> tuple[Reason | None, str]:
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
        return "reserved_text", f"says {IMAGE_PLACEHOLDER}"
    return None, ""


def confident(lines: Iterable[OcrLine], limits: QualityLimits) -> list[OcrLine]:
    """The lines that an engine is sure enough of."""
    return [line for line in lines if line.confidence >= limits.min_confidence]


def disagreement(first: str, second: str) -> float:
    """Character error rate between two readings, white space aside.

    Args:
        first: One.
        second: The other; which is which does not matter.

    Returns:
        Edits over the longer one's length: 0 the same, 1 nothing in common.
    """
    return float(Levenshtein.normalized_distance("".join(first.split()), "".join(second.split())))


def script_share(text: str, script: str) -> float:
    """Share of a text's letters that are of a script; 1.0 where there are none."""
    scripts = script_counts(text)
    total = sum(scripts.values())
    return scripts[script] / total if total else 1.0


def script_counts(text: str) -> Counter[str]:
    """Letters by script, as the first word of their Unicode names: LATIN, CYRILLIC, CJK, ..."""
    return Counter(_script(character) for character in text if character.isalpha())


@lru_cache(maxsize=1 << 14)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]
