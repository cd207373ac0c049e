"""Figures of alternating rounds: least, median, most; ratios, and when there is none."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

NO_RESULT = 1.15
"""Below it (and above its inverse) a ratio of times says nothing on an ordinary machine."""


def spread(values: Sequence[float]) -> list[float]:
    """Median, least and most."""
    return [statistics.median(values), min(values), max(values)]


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """The spread of the rounds' own ratios."""
    return spread([one / other for one, other in zip(over, under, strict=True)])


def figure(found: Sequence[float], digits: int = 2) -> str:
    """``median (least–most)``."""
    middle, least, most = (f"{value:,.{digits}f}" for value in found)
    return f"{middle} ({least}–{most})"


def ratio(found: Sequence[float]) -> str:
    """A ratio with its spread, or that there is none."""
    if 1 / NO_RESULT < found[0] < NO_RESULT:
        return f"no result ({found[1]:.2f}–{found[2]:.2f})"
    return figure(found)


def against(found: float, goal: float) -> str:
    """Whether a goal of at least so much is met."""
    return f"{goal:g}: {'met' if found >= goal else 'missed'}"
