"""Alternating rounds: where they ran, their median, minimum and maximum, and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

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


def describe_run(report: dict[str, Any]) -> str:
    """Return when, with which command, and where the steps of a report took turns, in one line."""
    machine = report["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in report["packages"].items())
    return (
        f"{report['date']}, `{report['command']}`: {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB,"
        f" {machine['system']} {machine['kind']}, Python {report['python']}, {packages}; {report['threads']}"
        f" thread; load average {report['load_before'][0]:.1f} before, {report['load_after'][0]:.1f} after;"
        f" {report['rounds']} rounds; {report['seconds'] / 60:.1f} minutes in all."
    )
