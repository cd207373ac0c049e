"""Uncertainty of figures: Wilson and bootstrap intervals, and the exact sign test for two runs on one data set."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from llavar_peft.page.run_figures import wilson

if TYPE_CHECKING:
    import numpy.typing as npt

    FloatArray: TypeAlias = npt.NDArray[np.float64]

RESAMPLES: Final = 1000
CONFIDENCE: Final = 0.95
_SEED: Final = 0


def ratio_intervals(points: FloatArray, out_of: FloatArray, *, counts: bool = True) -> list[tuple[float, float]]:
    """Return 95 % intervals of ratios: sums of points over sums of attainable points.

    Proportions have Wilson's interval. Where rows have several answers, it is that of the number of independent answers
    that vary as much as the rows do: answers on one image are alike, so that they count as fewer. Ratios of other
    points (means of similarities, error rates, ratings) have the percentile bootstrap interval, for which rows are
    drawn with replacement, see ``sum_by_name``; if every row has all points, or every row none, they have Wilson's of
    the rows too, because 0 of 20 does not mean 0. The result is deterministic.

    Args:
        points: ``[N, M]``: N rows, scored in M ways.
        out_of: ``[N, M]``: the attainable points.
        counts: Whether whole points are numbers of right answers out of ``out_of``.

    Returns:
        Lower and upper end for each of the M ways.
    """
    found = [
        (_count_interval(points[:, way], out_of[:, way]) if counts else None)
        or _proportion_interval(points[:, way], out_of[:, way])
        for way in range(points.shape[1])
    ]
    left = [way for way, interval in enumerate(found) if interval is None]
    for way, interval in zip(left, _bootstrap(points[:, left], out_of[:, left]) if left else (), strict=True):
        found[way] = interval
    return [interval for interval in found if interval is not None]


def _bootstrap(points: FloatArray, out_of: FloatArray) -> list[tuple[float, float]]:
    generator = np.random.default_rng(_SEED)
    rows = len(points)
    both = np.concatenate([points, out_of], axis=1)
    ratios = np.empty((RESAMPLES, points.shape[1]))
    for number in range(RESAMPLES):
        drawn = np.bincount(generator.integers(0, rows, rows), minlength=rows)
        sums = drawn @ both
        attainable = sums[points.shape[1] :]
        ratios[number] = sums[: points.shape[1]] / np.where(attainable > 0, attainable, 1.0)
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, [tail, 1.0 - tail], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def _count_interval(points: FloatArray, out_of: FloatArray) -> tuple[float, float] | None:
    """Return Wilson's interval of right answers out of all answers; None if the points are no such numbers."""
    counted = out_of > 0
    right, answers = points[counted], out_of[counted]
    whole = (right == np.floor(right)).all() and (answers == np.floor(answers)).all()
    if not len(right) or not whole or (right < 0).any() or (right > answers).any():
        return None
    total = float(answers.sum())
    share = float(right.sum()) / total
    if share in (0.0, 1.0):
        return wilson(share, len(right))
    variance = float(((right - share * answers) ** 2).sum()) / total**2
    independent = share * (1 - share) / variance if len(right) > 1 and variance > 0 else total if len(right) > 1 else 1
    return wilson(share, min(max(independent, 1.0), total))


def _proportion_interval(points: FloatArray, out_of: FloatArray) -> tuple[float, float] | None:
    """Return Wilson's interval if the rows are those of a proportion, or do not vary; None otherwise."""
    counted = out_of > 0
    weights, shares = out_of[counted], points[counted] / out_of[counted]
    whole = bool(np.isin(shares, (0.0, 1.0)).all())
    if not len(shares) or not whole or (np.ptp(weights) > 0 and np.ptp(shares) > 0):
        return None
    return wilson(float(shares.mean()), len(shares))


def sum_by_name(rows: FloatArray, names: Sequence[Hashable]) -> FloatArray:
    """Add up the rows with the same name, so that they are drawn together: questions on one image are not independent.

    Args:
        rows: ``[N, M]``.
        names: N names.

    Returns:
        One row for each name.
    """
    places: dict[Hashable, int] = {}
    which = np.array([places.setdefault(name, len(places)) for name in names])
    sums = np.zeros((len(places), rows.shape[1]))
    np.add.at(sums, which, rows)
    return sums


def difference_interval(rows: FloatArray) -> tuple[float, float]:
    """Return the 95 % paired bootstrap interval of the difference between two figures on the same rows.

    Args:
        rows: ``[N, 4]``: points and attainable points of the first run, then of the run that is subtracted.

    Returns:
        Lower and upper end.
    """
    generator = np.random.default_rng(_SEED)
    differences = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        drawn = np.bincount(generator.integers(0, len(rows), len(rows)), minlength=len(rows))
        points, out_of, other_points, other_out_of = drawn @ rows
        differences[number] = points / (out_of or 1.0) - other_points / (other_out_of or 1.0)
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(differences, [tail, 1.0 - tail])
    return float(low), float(high)


def sign_test(gained: int, lost: int) -> float:
    """Return the p value of the exact two-sided sign test.

    Args:
        gained: Number of pairs in which one side is better.
        lost: Number of pairs in which the other side is better; ties are left out.
    """
    changed = gained + lost
    tail = sum(math.comb(changed, count) for count in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**changed) if changed else 1.0
