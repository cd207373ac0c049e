"""Charts as plain values: paths on a field of 1000 x 1000 units and ticks in percent, which the template draws.

The field is stretched to the available width; lines and text keep their size on narrow and wide screens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Point = tuple[float, float]
Style = Literal[
    "faint", "main", "held", "exact", "chars", "blank", "curve0", "curve1", "curve2", "curve3", "curve4", "curve5"
]
_CURVES: tuple[Style, ...] = ("curve0", "curve1", "curve2", "curve3", "curve4", "curve5")
_FIELD = 1000.0
_MOST_POINTS = 500
_LOG_FROM_RATIO = 12.0
_CLIP_FROM_POINTS = 200


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one kind, drawn as a line, as dots, or as both."""

    style: Style
    label: str
    points: Sequence[Point]
    line: bool = True
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """A labelled position on an axis, in percent from the left or from the top."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Mark:
    """The SVG paths of a series, each of which may be empty; ``band`` is the area of its intervals."""

    style: Style
    label: str
    line: str
    dots: str
    band: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart for the template."""

    title: str
    summary: str
    marks: tuple[Mark, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    note: str


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Return the position of ``value`` between ``low`` (0) and ``high`` (1)."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def running_mean(points: Sequence[Point], window: int) -> list[Point]:
    """Return the centred mean over ``window`` points, and over fewer at both ends."""
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    half = window // 2
    smooth = []
    for index, (x, _) in enumerate(points):
        first, last = max(0, index - half), min(len(points), index + half + 1)
        smooth.append((x, (sums[last] - sums[first]) / (last - first)))
    return smooth


def _thin(points: Sequence[Point]) -> list[Point]:
    """Return about ``_MOST_POINTS`` points at most, with the lowest and highest of each stretch."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / _MOST_POINTS)
    kept: list[Point] = []
    for first in range(0, len(points), size):
        stretch = points[first : first + size]
        extremes = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept.extend(sorted(extremes))
    return kept


def _nice_step(span: float, expected: int) -> float:
    rough = span / expected
    power = float(10.0 ** math.floor(math.log10(rough)))
    return next((power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999), power * 10)


def _linear_ticks(low: float, high: float, expected: int, *, integers: bool = False) -> list[float]:
    step = _nice_step(high - low, expected)
    step = max(1.0, step) if integers else step
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(ticks) <= 6:
            break
    return ticks[:: math.ceil(len(ticks) / 6)]


def _tick_label(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e\N{MINUS SIGN}{abs(int(power))}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _finite(points: Sequence[Point]) -> list[Point]:
    return [point for point in points if math.isfinite(point[1])]


def _loss_axis(raw: Sequence[float], others: Sequence[float]) -> _Axis:
    """Return a logarithmic axis for a wide positive range, else a linear one that ignores a few spikes."""
    low, high = min([*raw, *others]), max([*raw, *others])
    if low > 0 and high / low > _LOG_FROM_RATIO:
        return _Axis(low / 1.15, high * 1.15, log=True)
    if len(raw) >= _CLIP_FROM_POINTS:
        high = max([sorted(raw)[int(0.995 * len(raw))], *others])
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return _Axis(low - room if low < 0 else max(low - room, 0.0), high + room)


def _draw(series: Series, x_axis: _Axis, y_axis: _Axis) -> Mark:
    positions = [
        f"{x_axis.share(x) * _FIELD:.1f} {(1 - y_axis.share(y)) * _FIELD:.1f}" for x, y in _thin(_finite(series.points))
    ]
    line = "M" + "L".join(positions) if series.line and len(positions) > 1 else ""
    dots = "".join(f"M{position}h0" for position in positions) if series.dots or len(positions) == 1 else ""
    return Mark(series.style, series.label, line, dots)


def _assemble(title: str, series: Sequence[Series], last_step: int, y_axis: _Axis, y_ticks: Sequence[Tick]) -> Chart:
    x_axis = _Axis(-0.012 * max(last_step, 1), 1.012 * max(last_step, 1))
    marks = tuple(_draw(one, x_axis, y_axis) for one in series)
    steps = _linear_ticks(0.0, max(last_step, 1), 5, integers=True)
    x_ticks = tuple(Tick(100 * x_axis.share(step), f"{step:,.0f}" if step else "step 0") for step in steps)
    ends = [(one.label, _finite(one.points)) for one in series]
    ranges = "; ".join(f"{label}: {_tick_label(at[0][1])} to {_tick_label(at[-1][1])}" for label, at in ends if at)
    return Chart(title, f"{title} over {last_step} steps. {ranges}", marks, x_ticks, tuple(y_ticks), "")


def _y_ticks(axis: _Axis, expected: int) -> list[Tick]:
    values = _log_ticks(axis.low, axis.high) if axis.log else _linear_ticks(axis.low, axis.high, expected)
    return [Tick(100 * (1 - axis.share(value)), _tick_label(value)) for value in values]


def loss_chart(steps: Sequence[Point], held_out: Sequence[Point], last_step: int) -> Chart | None:
    """Return the loss over the steps: each step in a faint line, the running mean, and the held-out loss as dots."""
    raw, held = _finite(steps), _finite(held_out)
    if not raw and not held:
        return None
    window = min(101, len(raw) // 20) | 1
    smooth = running_mean(raw, window) if window >= 3 else []
    axis = _loss_axis([y for _, y in raw], [y for _, y in [*smooth, *held]])
    series = [Series("faint", "each step", raw), Series("main", f"mean of {window} steps", smooth)]
    if not smooth:
        series = [Series("main", "each step", raw)]
    if held:
        series.append(Series("held", "held out", held, line=False, dots=True))
    chart = _assemble("Loss", [one for one in series if one.points], last_step, axis, _y_ticks(axis, 5))
    notes = ["logarithmic axis"] if axis.log else []
    above = sum(y > axis.high for _, y in raw)
    notes += [f"{above} above the axis"] if above else []
    missing = len(steps) - len(raw)
    notes += [f"{missing} not finite"] if missing else []
    return Chart(chart.title, chart.summary, chart.marks, chart.x_ticks, chart.y_ticks, ", ".join(notes))


def plain_chart(title: str, values: Sequence[Point], last_step: int, *, window: int = 1) -> Chart | None:
    """Return a quantity over the steps on an axis from 0; with a window, a faint line and its running mean."""
    points = _finite(values)
    if not points:
        return None
    series, top = [Series("main", title.lower(), points)], max(y for _, y in points)
    if 3 <= window < len(points):
        smooth = running_mean(points, window)
        series = [Series("faint", "each step", points), Series("main", f"mean of {window} steps", smooth)]
        top = 1.15 * max(y for _, y in smooth)  # so that a few very high values do not flatten the rest
    top = top or 1.0
    axis = _Axis(-0.04 * top, 1.08 * top)
    return _assemble(title, series, last_step, axis, _y_ticks(axis, 2))


def accuracy_chart(series: Sequence[Series], last_step: int) -> Chart | None:
    """Return shares between 0 and 1 over the steps on an axis from 0 to 100 %."""
    shown = [one for one in series if _finite(one.points)]
    if not shown:
        return None
    axis = _Axis(-0.05, 1.05)
    ticks = [Tick(100 * (1 - axis.share(share)), f"{100 * share:.0f} %") for share in (0.0, 0.5, 1.0)]
    return _assemble("Accuracy", shown, last_step, axis, ticks)


def height_chart(curves: Sequence[tuple[str, Sequence[tuple[float, float, float, float]]]], note: str) -> Chart:
    """Return the accuracy of models over letter heights in pixels, with intervals as bands.

    Args:
        curves: Name, and points (height, accuracy, lower end, upper end) in percent, in ascending order of height.
        note: What the legend adds to the names.
    """
    heights = sorted({point[0] for _, points in curves for point in points})
    room = 0.02 * (heights[-1] - heights[0]) or 0.5
    x_axis, y_axis = _Axis(heights[0] - room, heights[-1] + room), _Axis(-4.0, 104.0)

    def path(points: Sequence[Point]) -> str:
        return "L".join(f"{x_axis.share(x) * _FIELD:.1f} {(1 - y_axis.share(y)) * _FIELD:.1f}" for x, y in points)

    marks = []
    for number, (name, points) in enumerate(curves):
        style = _CURVES[number % len(_CURVES)]
        mark = _draw(Series(style, name, [(x, y) for x, y, _, _ in points], dots=True), x_axis, y_axis)
        edge = [(x, high) for x, _, _, high in points] + [(x, low) for x, _, low, _ in reversed(points)]
        marks.append(Mark(style, name, mark.line, mark.dots, f"M{path(edge)}Z" if len(points) > 1 else ""))
    whole = _linear_ticks(heights[0], heights[-1], 9, integers=True) if len(heights) > 1 else heights
    ticks = whole or heights[:1]
    x_ticks = [Tick(100 * x_axis.share(x), f"{x:g} px" if x == ticks[-1] else f"{x:g}") for x in ticks]
    y_ticks = [Tick(100 * (1 - y_axis.share(y)), f"{y} %") for y in (0, 25, 50, 75, 100)]
    ranges = "; ".join(f"{name}: {points[0][1]:.0f} to {points[-1][1]:.0f} %" for name, points in curves)
    summary = f"Accuracy from {heights[0]:g} to {heights[-1]:g} pixels. {ranges}"
    return Chart("Share of right answers", summary, tuple(marks), tuple(x_ticks), tuple(y_ticks), note)
