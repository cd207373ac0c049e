"""Accuracy at each letter height, where it falls, and the file that holds both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import msgspec

from llavar_peft.atomic_files import write_json
from llavar_peft.errors import DAMAGED, DataError, describe_reason
from llavar_peft.evaluation.vqa.scored_results import Setting
from llavar_peft.text_files import read_json
from llavar_peft.types import ReadableRepr, expand_home

_FORMAT: Final = 1
_FIX: Final = "give a file written by 'llavar-peft eval heights --out'"
READABLE: Final = 90.0
"""Percent of right answers from which letters count as readable."""

CrossingState: TypeAlias = Literal["crossed", "always", "never"]


@dataclass(frozen=True, slots=True)
class HeightPoint:
    """The figure at a height.

    Attributes:
        height: Letter height in pixels of the prepared image.
        value: Accuracy in percent.
        low: Lower end of the 95 % interval.
        high: Upper end.
        questions: Number of answers.
        images: Number of images.
        enlarged: Number of answers whose letters were shown larger than in the image file.
    """

    height: float
    value: float
    low: float
    high: float
    questions: int
    images: int
    enlarged: int


@dataclass(frozen=True, slots=True)
class Crossing:
    """Where accuracy falls below a threshold.

    Attributes:
        threshold: Percent.
        state: ``crossed``; ``always`` if no height is below the threshold; ``never`` if the greatest height is.
        height: The height at which accuracy reaches the threshold and stays at or above it for all greater heights,
            interpolated between the two heights around it; None if it is not crossed.
    """

    threshold: float
    state: CrossingState
    height: float | None


@dataclass(frozen=True, slots=True, repr=False)
class HeightCurve(ReadableRepr):
    """The figures of a model.

    Attributes:
        name: Name of the model in the chart.
        setting: How the answers were generated.
        side: Side in pixels of the prepared image that heights refer to.
        points: The figures in ascending order of height.
        left_out: Number of questions that were asked at no height, by reason.
    """

    name: str
    setting: Setting
    side: float
    points: tuple[HeightPoint, ...]
    left_out: Mapping[str, int]

    @property
    def best(self) -> float:
        """The highest accuracy."""
        return max(point.value for point in self.points)

    @property
    def crossings(self) -> tuple[Crossing, Crossing]:
        """Where accuracy falls below ``READABLE``, and below half of the best."""
        half = find_crossing(self.points, self.best / 2) if self.best else Crossing(0.0, "never", None)
        return find_crossing(self.points, READABLE), half


@dataclass(frozen=True, slots=True, repr=False)
class HeightResults(ReadableRepr):
    """The figures of several models on the same data set.

    Attributes:
        dataset: File or name of the data set.
        protocol: The protocol that scored the answers.
        total: Number of questions of the data set.
        too_small: What was done about questions whose letters are lower than a height; see ``HeightSettings``.
        measured: Where the heights of the letters come from.
        curves: The figures by model.
    """

    dataset: str
    protocol: str
    total: int
    too_small: str
    measured: str
    curves: tuple[HeightCurve, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as plain data for JSON."""
        plain = asdict(self)
        for entry, curve in zip(plain["curves"], self.curves, strict=True):
            entry["best"] = curve.best
            entry["crossings"] = [asdict(crossing) for crossing in curve.crossings]
        return {"format": _FORMAT, **plain}


def find_crossing(points: Sequence[HeightPoint], threshold: float) -> Crossing:
    """Return where accuracy falls below a threshold for the first time, from the greatest height downwards."""
    ordered = sorted(points, key=lambda point: -point.height)
    if ordered[0].value < threshold:
        return Crossing(threshold, "never", None)
    for above, below in pairwise(ordered):
        if below.value < threshold:
            share = (threshold - below.value) / (above.value - below.value)
            return Crossing(threshold, "crossed", below.height + share * (above.height - below.height))
    return Crossing(threshold, "always", None)


def describe_crossing(crossing: Crossing, points: Sequence[HeightPoint]) -> str:
    """Return a crossing in a few characters: ``6.4 px``, ``below 3 px``, or ``above 19 px``."""
    if crossing.threshold == 0:
        return "no right answer"
    if crossing.height is not None:
        return f"{crossing.height:.1f} px"
    heights = [point.height for point in points]
    return f"below {min(heights):g} px" if crossing.state == "always" else f"above {max(heights):g} px"


def write_height_results(results: HeightResults, path: Path) -> None:
    """Write figures atomically."""
    write_json(path, results.as_dict())


def read_height_results(path: str | Path) -> HeightResults:
    """Read figures that ``write_height_results`` wrote.

    Raises:
        DataError: The file holds none.
    """
    path = expand_home(path)
    plain = read_json(path, fix=_FIX, lenient=True)
    try:
        if plain["format"] != _FORMAT or not isinstance(plain["curves"], list):
            raise ValueError(f"format {plain['format']}, expected {_FORMAT}")
        results = msgspec.convert(plain, HeightResults)
        for curve in results.curves:
            _check_points(curve.points)
    except DAMAGED as error:
        raise DataError.at(
            str(path), f"cannot be read as figures by height ({describe_reason(error)})", _FIX
        ) from error
    if not results.curves:
        raise DataError.at(str(path), "contains no figures", _FIX)
    return results


def _check_points(points: Sequence[HeightPoint]) -> None:
    if not points:
        raise ValueError("a curve without figures")
    for point in points:
        figures = (point.value, point.low, point.high)
        if not all(0 <= figure <= 100 for figure in figures) or not 0 < point.height < 1e6:
            raise ValueError(f"a figure is outside 0 to 100, or a height is none (height {point.height})")
    heights = [point.height for point in points]
    if heights != sorted(set(heights)):
        raise ValueError("the heights are not in ascending order")
    if not all(math.isfinite(height) for height in heights):
        raise ValueError("a height is not finite")
