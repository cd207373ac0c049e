"""Where on an image an answer stands, and how high its letters are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from llavar_peft.datagen.synth.scene import PlacedLine, Quad

_LONGEST_RUN = 6  # lines that an answer may be broken into


def measure_answer(question: str, answer: str, lines: Sequence[PlacedLine], quads: Sequence[Quad]) -> dict[str, Any]:
    """Measure the text that holds an answer, as ``eval diagnose`` wants it.

    Args:
        question: Tells two lines that say the same apart: what is asked for stands after its label.
        answer: What is written there; a whole transcript is too.
        lines: The image's text, in reading order.
        quads: Where their ink is, in pixels.

    Returns:
        ``text_height``, the median height of the lines' ink in pixels; and of a few lines ``box``, around them.
    """
    run = _find(question, answer, lines)
    if run is None:
        return {"text_height": line_height(quads)}
    found = [quads[number] for number in run]
    return {"text_height": line_height(found), "box": surround(found)}


def line_height(quads: Sequence[Quad]) -> float:
    """The median height of lines in pixels: along their sides, so that a slant does not add to it."""
    heights = [(math.dist(quad[0], quad[3]) + math.dist(quad[1], quad[2])) / 2 for quad in quads]
    return round(median(heights), 2)


def surround(quads: Sequence[Quad]) -> list[float]:
    """The box around lines: left, top, right, bottom in pixels."""
    xs = [x for quad in quads for x, _ in quad]
    ys = [y for quad in quads for _, y in quad]
    return [round(value, 2) for value in (min(xs), min(ys), max(xs), max(ys))]


def _find(question: str, answer: str, lines: Sequence[PlacedLine]) -> range | None:
    """The lines that say the answer with the least beside it; of several such, those after a label in the question."""
    expected = answer.split()
    best: tuple[int, bool, int] | None = None
    found = None
    for start in range(len(lines)):
        for end in range(start + 1, min(len(lines), start + _LONGEST_RUN) + 1):
            words = [word for line in lines[start:end] for word in line.text.split()]
            if not _holds(words, expected):
                continue
            unlabelled = start == 0 or lines[start - 1].text not in question
            key = (len(words), unlabelled, start)
            if best is None or key < best:
                best, found = key, range(start, end)
            break
    return found


def _holds(words: Sequence[str], expected: Sequence[str]) -> bool:
    return any(words[at : at + len(expected)] == expected for at in range(len(words) - len(expected) + 1))
