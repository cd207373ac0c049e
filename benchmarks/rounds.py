"""Statistics of alternating rounds: median, minimum and maximum, and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

NO_RESULT = 1.15
"""A ratio of times below this value and above its inverse is not significant on an ordinary machine."""


def spread(values: Sequence[float]) -> list[float]:
    """Return median, minimum and maximum."""
    return [statistics.median(values), min(values), max(values)]


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return median, minimum and maximum of the ratios of the rounds."""
    return spread([one / other for one, other in zip(over, under, strict=True)])


def figure(found: Sequence[float], digits: int = 2) -> str:
    """Format figures as ``median (minimum–maximum)``."""
    middle, least, most = (f"{value:,.{digits}f}" for value in found)
    return f"{middle} ({least}–{most})"


def ratio(found: Sequence[float]) -> str:
    """Format a ratio with its spread, or report that there is no result."""
    if 1 / NO_RESULT < found[0] < NO_RESULT:
        return f"no result ({found[1]:.2f}–{found[2]:.2f})"
    return figure(found)


def against(found: float, goal: float) -> str:
    """Format whether a goal, a lower bound, is met."""
    return f"{goal:g}: {'met' if found >= goal else 'missed'}"
