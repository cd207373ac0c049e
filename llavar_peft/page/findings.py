"""What the figures of a run or of an evaluation say about the next step, in at most a few sentences.

Each function returns a finding only if the figures support it beyond their noise; its docstring states the rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist, fmean, median
from typing import Final

from llavar_peft.page.run_figures import Z, wilson
from llavar_peft.page.run_log import ProbeLog, StageLog

MOST_FINDINGS: Final = 3
"""Number of findings at the beginning of a page, the most useful ones."""

_LEAST_STEPS: Final = 40  # in the part of the curve that is fitted
_LAST_PART: Final = 0.25
_STEEP: Final = 3.0  # standard errors
_LEAST_FALL: Final = 0.02

_RISE: Final = 0.02
_RISE_OF_FEW: Final = 0.1
_MANY_PROBES: Final = 6
_CLEAR: Final = 5.0  # standard deviations of the noise
_MAD_TO_DEVIATION: Final = 1.4826

_FEWEST_RECORDS: Final = 30
_WIDEST: Final = 20.0  # points
_CLOSE: Final = 5.0  # points on each side

GAP: Final = 10.0
"""Points that a part has to be below the rest."""
FEWEST_IN_PART: Final = 10
"""Records that a part needs to have."""
_LEAST_SMALL: Final = 0.05

_ORDER: Final = ("rising", "falling", "small", "weak", "range", "few")


@dataclass(frozen=True, slots=True)
class Finding:
    """A sentence about the next step; ``kind`` is its rule: rising, falling, small, weak, range or few."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class PartFigure:
    """The figure of a part of the records next to that of all others, in percent with 95 % intervals.

    Attributes:
        by: What the records are grouped by.
        name: The value that the part has in common.
        records: Number of records in the part.
        value: The figure of the part.
        low: Lower end of its interval.
        high: Upper end.
        rest: The figure of all other records.
        rest_low: Lower end of its interval.
        rest_high: Upper end.
    """

    by: str
    name: str
    records: int
    value: float
    low: float
    high: float
    rest: float
    rest_low: float
    rest_high: float


def choose_findings(found: Iterable[Finding | None]) -> tuple[Finding, ...]:
    """Return the most useful findings, at most ``MOST_FINDINGS``, each sentence once."""
    known = dict.fromkeys(one for one in found if one is not None)
    return tuple(sorted(known, key=lambda one: _ORDER.index(one.kind))[:MOST_FINDINGS])


def find_in_run(stages: Sequence[StageLog]) -> tuple[Finding, ...]:
    """Return the findings of a run: those of its stages, and whether its last evaluation has too few images."""
    found: list[Finding | None] = []
    for stage in stages:
        rising = find_rising_loss(stage)
        found += [rising, None if rising else find_falling_loss(stage)]
    asked = [probe for stage in stages for probe in stage.probes if probe.exact_match is not None and probe.count > 0]
    if asked and asked[-1].exact_match is not None and 0 <= asked[-1].exact_match <= 1:
        low, high = wilson(asked[-1].exact_match, asked[-1].count)
        found.append(find_few_records("exact match", asked[-1].count, 100 * low, 100 * high, "held-out image"))
    return choose_findings(found)


def find_falling_loss(stage: StageLog) -> Finding | None:
    """Return whether the training loss was still falling when a stage ended.

    Rule: the slope of the line through the last quarter of the steps, at least 40, is below zero by three standard
    errors, which count neighboring steps that are alike as fewer; over these steps the line falls by at least 2 % of
    its mean; and no held-out loss of the stage is lower than the last one. A stage that is still running has none, nor
    has one after which all held-out answers are right.
    """
    steps = [step for step in stage.steps if math.isfinite(step.loss)]
    count = max(_LEAST_STEPS, round(_LAST_PART * len(steps)))
    held = _held_out(stage)
    if len(steps) < count or (stage.probes and stage.probes[-1].when != "end"):
        return None
    if stage.probes and stage.probes[-1].exact_match == 1:
        return None
    if len(held) > 1 and min(loss for _, loss in held) < held[-1][1]:
        return None
    slope, error, mean = _fit_line([step.loss for step in steps[-count:]])
    fall = -slope * (count - 1)
    if slope > -_STEEP * error or fall < _LEAST_FALL * mean:
        return None
    return Finding(
        "falling",
        f"The training loss of {stage.name} was still falling at its end, by {100 * fall / mean:.0f} % in the last "
        f"{count} steps: train longer (more epochs).",
    )


def _fit_line(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the slope per step, its standard error, and the mean of the values."""
    count, mean = len(values), fmean(values)
    places = [place - (count - 1) / 2 for place in range(count)]
    squares = sum(place * place for place in places)
    slope = sum(place * value for place, value in zip(places, values, strict=True)) / squares
    left = [value - mean - slope * place for place, value in zip(places, values, strict=True)]
    variance = sum(one * one for one in left) / (count - 2)
    # Residuals that resemble their neighbors carry less information than as many independent ones.
    alike = sum(one * other for one, other in pairwise(left)) / (variance * count or 1.0)
    inflation = (1 + min(max(alike, 0.0), 0.9)) / (1 - min(max(alike, 0.0), 0.9))
    return slope, math.sqrt(variance / squares * inflation), mean


def find_rising_loss(stage: StageLog) -> Finding | None:
    """Return whether the held-out loss of a stage rose after its lowest value, while the answers became no better.

    Rule: the mean of the last two values, of which the lowest is none, is above the lowest by 2 % of it and by five
    times the noise of the curve, which its third differences give, and each of the two by half as much. With fewer than
    six values, those after the lowest, the last two at most, are each above it by 10 %. Exact match at the end is not
    above that at the lowest loss. Of noise alone, about one curve in forty has this form.
    """
    held = _held_out(stage)
    if len(held) < 3:
        return None
    place, (best, lowest) = min(enumerate(held), key=lambda item: item[1][1])
    after = [loss for _, loss in held[place + 1 :]][-2:]
    losses = [loss for _, loss in held]
    many = len(losses) >= _MANY_PROBES
    needed = max(_RISE * lowest, _CLEAR * _noise(losses)) if many else _RISE_OF_FEW * lowest
    if not after or (many and len(after) < 2) or fmean(after) < lowest + needed:
        return None
    if min(after) < lowest + (needed / 2 if many else needed):
        return None
    last = held[-1][0]
    if best.exact_match is not None and last.exact_match is not None and last.exact_match > best.exact_match:
        return None
    where = "before training" if best.step == 0 else f"at step {best.step:,}"
    advice = (
        "check that the records are like the held-out ones, and lower the learning rate"
        if best.step == 0
        else f"stop earlier, near step {best.step:,} (fewer epochs)"
    )
    return Finding(
        "rising",
        f"The held-out loss of {stage.name} was lowest {where} ({lowest:.3f}) and rose to {losses[-1]:.3f}: {advice}.",
    )


def _held_out(stage: StageLog) -> list[tuple[ProbeLog, float]]:
    losses = ((probe, probe.held_out_loss) for probe in stage.probes)
    return [(probe, loss) for probe, loss in losses if loss is not None and math.isfinite(loss)]


def _noise(values: Sequence[float]) -> float:
    """Return the standard deviation of the noise of a smooth curve."""
    changes = list(values)
    for _ in range(3):
        changes = [after - before for before, after in pairwise(changes)]
    return _MAD_TO_DEVIATION * median(map(abs, changes)) / math.sqrt(20)  # the sum of the squares of 1, 3, 3, 1


def find_few_records(figure: str, records: int, low: float, high: float, noun: str = "record") -> Finding | None:
    """Return whether a figure rests on too few records to mean much.

    Rule: there are fewer than 30, or its 95 % interval is wider than 20 points.

    Args:
        figure: Name of the figure.
        records: Number of records.
        low: Lower end of the interval, in percent.
        high: Upper end.
        noun: What the records are, in the singular.
    """
    if records < 1 or (records >= _FEWEST_RECORDS and high - low <= _WIDEST):
        return None
    middle = min(max((low + high) / 200, 0.0), 1.0)
    needed = math.ceil(Z**2 * middle * (1 - middle) / (_CLOSE / 100) ** 2 / 10) * 10
    more = f": about {needed:,} would show it to within {_CLOSE:g} points" if needed > records else ""
    return Finding(
        "few",
        f"{records:,} {noun}{'' if records == 1 else 's'} say little: the 95 % interval of {figure} is {low:.0f} to "
        f"{high:.0f} %{more}.",
    )


def find_weak_part(parts: Sequence[PartFigure], compared: int, advice: str) -> Finding | None:
    """Return the part of the records that is furthest below all others, if one is.

    Rule: the part has at least ten records and is at least 10 points below the rest; the two intervals do not overlap;
    and the difference is significant at 5 % among all parts that were compared (Bonferroni).

    Args:
        parts: The parts that may be far below.
        compared: Number of parts that were compared.
        advice: What to do about it.
    """
    limit = NormalDist().inv_cdf(1 - 0.025 / max(1, compared))
    weak = [
        part
        for part in parts
        if part.records >= FEWEST_IN_PART
        and part.rest - part.value >= GAP
        and part.high < part.rest_low
        and part.rest - part.value >= limit * math.hypot(part.high - part.low, part.rest_high - part.rest_low) / 2 / Z
    ]
    if not weak:
        return None
    worst = max(weak, key=lambda part: (part.rest_low - part.high, part.rest - part.value))
    return Finding(
        "weak",
        f"{worst.by} {worst.name} is far below the rest: {worst.value:.0f} % ({worst.low:.0f} to {worst.high:.0f}) "
        f"against {worst.rest:.0f} % ({worst.rest_low:.0f} to {worst.rest_high:.0f}): {advice}.",
    )


def find_small_letters(
    small: PartFigure | None, known: int, smallest: float, factor: float, setting: str | None = None
) -> Finding | None:
    """Return whether letters are too small for the model to read.

    Rule: at least 5 % of the records with a known height, and at least ten, are below the smallest readable height,
    and their interval lies below that of the others.

    Args:
        small: The figure of the records with small letters; None if there are none, or no others.
        known: Number of records whose height is known.
        smallest: Height from which letters are read, in pixels of the tower's input.
        factor: How much larger the letters would have to be.
        setting: The line of the recipe that makes them so large, if it is known.
    """
    if small is None or small.records < max(FEWEST_IN_PART, _LEAST_SMALL * known) or small.high >= small.rest_low:
        return None
    how = (
        f"put {setting} under model: in the recipe"
        if setting
        else f"a model.resolution that shows them {factor:.1f} times as large would; llavar-peft eval diagnose "
        "--records RECORDS --model MODEL names it"
    )
    return Finding(
        "small",
        f"{100 * small.records / known:.0f} % of the answers stand in letters below {smallest:g} px of the tower's "
        f"input: {small.value:.0f} % of these are right, {small.rest:.0f} % of the others. To read them, {how}.",
    )
