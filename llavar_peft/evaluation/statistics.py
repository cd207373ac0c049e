"""How sure a figure is: bootstrap intervals, and the exact sign test for two runs on the same questions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    FloatArray: TypeAlias = npt.NDArray[np.float64]

RESAMPLES: Final = 1000
CONFIDENCE: Final = 0.95
_SEED: Final = 0


def ratio_intervals(points: FloatArray, out_of: FloatArray) -> list[tuple[float, float]]:
    """Intervals of figures that are sums of points over sums of what could be reached: percentile bootstrap, 95 %.

    What is drawn again is a row, so that what belongs together (the questions on one picture) should be one.

    Args:
        points: ``[N, M]``: of N rows, in M ways of scoring.
        out_of: ``[N, M]``.

    Returns:
        Lower and upper end for each way, the same for the same numbers.
    """
    generator = np.random.default_rng(_SEED)
    rows = len(points)
    both = np.concatenate([points, out_of], axis=1)
    ratios = np.empty((RESAMPLES, points.shape[1]))
    for number in range(RESAMPLES):
        drawn = np.bincount(generator.integers(0, rows, rows), minlength=rows)
        sums = drawn @ both
        ratios[number] = sums[: points.shape[1]] / np.maximum(sums[points.shape[1] :], 1e-12)
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, [tail, 1.0 - tail], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def difference_interval(
    ours: tuple[FloatArray, FloatArray], theirs: tuple[FloatArray, FloatArray]
) -> tuple[float, float]:
    """Interval of the difference between two figures on the same rows, which are drawn together.

    Args:
        ours: Points and what could be reached, ``[N]`` each.
        theirs: The same of the run that is subtracted.

    Returns:
        Lower and upper end.
    """
    generator = np.random.default_rng(_SEED)
    rows = len(ours[0])
    table = np.stack([*ours, *theirs], axis=1)
    differences = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        sums = np.bincount(generator.integers(0, rows, rows), minlength=rows) @ table
        differences[number] = sums[0] / max(sums[1], 1e-12) - sums[2] / max(sums[3], 1e-12)
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(differences, [tail, 1.0 - tail])
    return float(low), float(high)


def sign_test(gained: int, lost: int) -> float:
    """The exact two-sided sign test: how often a fair coin falls at least as unevenly.

    Args:
        gained: Pairs in which one side is better.
        lost: Pairs in which the other is; ties are left out.

    Returns:
        The p value; 1 where nothing differs.
    """
    changed = gained + lost
    tail = sum(math.comb(changed, count) for count in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**changed) if changed else 1.0
