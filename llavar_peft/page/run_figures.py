"""The figures of a run's page: headline, table of probes, facts and charts of each stage, dropped records."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from llavar_peft.page.charts import Chart, Point, Series, accuracy_chart, loss_chart, plain_chart
from llavar_peft.page.image_gallery import displayed_answers
from llavar_peft.page.named_probes import NamedProbe
from llavar_peft.page.run_log import ProbeLog, StageLog, StepLine

Z = 1.959964
"""Standard deviations on each side of a 95 % interval."""
_DASH = "\N{EN DASH}"
_MOST_REASONS = 12


@dataclass(frozen=True, slots=True)
class HeadFigure:
    """A large figure: exact match of a probe, and the control with blank images."""

    label: str
    share: float
    control: float | None
    count: int


@dataclass(frozen=True, slots=True)
class StageView:
    """The values that the page shows of a stage."""

    name: str
    state: str
    facts: tuple[tuple[str, str], ...]
    loss: Chart | None
    accuracy: Chart | None
    rate: Chart | None
    speed: Chart | None
    memory: Chart | None


@dataclass(frozen=True, slots=True)
class DropRow:
    """The number of records that a stage dropped for one reason, with examples."""

    stage: str
    reason: str
    count: int
    examples: str


def percent(share: float | None) -> str:
    """Return a share as a percentage with one decimal, or a dash if there is none."""
    return _DASH if share is None or not math.isfinite(share) else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    """Return a duration in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"


def headline(probes: Sequence[NamedProbe]) -> tuple[HeadFigure, ...]:
    """Return the large figures: exact match before training, after each stage, and of the latest probe."""
    return tuple(
        HeadFigure(named.label, named.probe.exact_match, named.probe.blank_exact_match, named.probe.count)
        for named in probes
        if named.main and named.probe.exact_match is not None
    )


def on_other_records(probes: Sequence[NamedProbe]) -> str:
    """Return the names of the stages with other held-out records than the stage before; empty if there are none."""
    names = [named.stage.name for named in probes if named.main and named.probe.when == "start"]
    return ", ".join(names[1:])


def probe_rows(probes: Sequence[NamedProbe]) -> list[list[tuple[str, str]]]:
    """Return the table of the main probes with cells (column, value), without the columns that are empty."""
    rows: list[list[tuple[str, str]]] = []
    for named in probes:
        probe = named.probe
        if not named.main:
            continue
        interval = _DASH
        if probe.exact_match is not None and probe.count > 0 and 0 <= probe.exact_match <= 1:
            low, high = wilson(probe.exact_match, probe.count)
            interval = f"{100 * low:.1f}{_DASH}{100 * high:.1f}"
        loss = probe.held_out_loss
        rows.append(
            [
                ("When", named.label),
                ("Exact match", percent(probe.exact_match)),
                ("Interval", interval),
                ("Characters", percent(probe.character_accuracy)),
                ("Blank images", percent(probe.blank_exact_match)),
                ("Held-out loss", _DASH if loss is None else f"{loss:.3f}"),
                ("Images", f"{probe.count:,}"),
            ]
        )
    filled = {column for row in rows for column, value in row if value != _DASH}
    return [[cell for cell in row if cell[0] in filled] for row in rows]


def wilson(share: float, count: float) -> tuple[float, float]:
    """Return Wilson's 95 % confidence interval of a share observed on ``count`` independent records."""
    centre = (share + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    # Rounding would leave a trace of the other end.
    return (0.0 if share == 0 else max(0.0, centre - half)), (1.0 if share == 1 else min(1.0, centre + half))


def run_figures(stages: Sequence[StageLog]) -> list[tuple[str, str]]:
    """Return the smaller figures of the run as (label, value)."""
    steps = [step for stage in stages for step in stage.steps]
    return [("Steps", f"{len(steps):,}"), *_work(steps)] if steps else []


def _work(steps: Sequence[StepLine]) -> list[tuple[str, str]]:
    rows = []
    seconds = sum(step.seconds or 0.0 for step in steps)
    tokens = sum(step.tokens or 0.0 for step in steps if step.seconds)
    supervised = sum(step.supervised_tokens or 0.0 for step in steps)
    peaks = [step.peak_memory_mb for step in steps if step.peak_memory_mb is not None]
    if seconds > 0:
        rows.append(("Time in steps", duration(seconds)))
    if seconds > 0 and tokens > 0:
        rows.append(("Useful tokens per second", f"{tokens / seconds:,.0f}"))
    if supervised > 0:
        rows.append(("Supervised tokens", f"{supervised:,.0f}"))
    if peaks:
        rows.append(("Peak memory", f"{max(peaks):,.0f} MB"))
    return rows


def describe_stage(stage: StageLog) -> StageView:
    """Return the facts and charts of a stage."""
    probes = stage.probes
    last = max([step.step for step in stage.steps[-1:]] + [probe.step for probe in probes[-1:]] + [1])
    held = [(float(probe.step), probe.held_out_loss) for probe in probes if probe.held_out_loss is not None]
    series = [
        Series("exact", "exact match", _shares(probes, lambda probe: probe.exact_match), dots=True),
        Series("chars", "characters", _shares(probes, lambda probe: probe.character_accuracy), dots=True),
        Series("blank", "blank images", _shares(probes, lambda probe: probe.blank_exact_match), dots=True),
    ]
    window = min(51, len(stage.steps) // 10) | 1
    rates = [(float(step.step), step.learning_rate) for step in stage.steps if step.learning_rate is not None]
    return StageView(
        name=stage.name,
        state=_state(stage),
        facts=tuple(_stage_facts(stage)),
        loss=loss_chart([(float(step.step), step.loss) for step in stage.steps], held, last),
        accuracy=accuracy_chart(series, last),
        rate=plain_chart("Learning rate", rates, last),
        speed=plain_chart("Useful tokens per second", _speeds(stage.steps), last, window=window),
        memory=plain_chart("Peak memory, MB", _peaks(stage.steps), last),
    )


def _speeds(steps: Sequence[StepLine]) -> list[Point]:
    return [(float(step.step), step.tokens / step.seconds) for step in steps if step.tokens and step.seconds]


def _peaks(steps: Sequence[StepLine]) -> list[Point]:
    return [(float(step.step), step.peak_memory_mb) for step in steps if step.peak_memory_mb is not None]


def _shares(probes: Sequence[ProbeLog], share: Callable[[ProbeLog], float | None]) -> list[Point]:
    values = [(float(probe.step), share(probe)) for probe in probes]
    return [(step, value) for step, value in values if value is not None]


def _state(stage: StageLog) -> str:
    if not stage.steps:
        return "no steps yet"
    return "" if not stage.probes or stage.probes[-1].when == "end" else "not evaluated at its end yet"


def _stage_facts(stage: StageLog) -> list[tuple[str, str]]:
    if not stage.steps:
        return []
    tail = [step.loss for step in stage.steps[-max(1, min(20, len(stage.steps) // 10)) :]]
    epoch = stage.steps[-1].epoch
    rows = [("Steps", f"{len(stage.steps):,}")]
    if epoch is not None:
        rows.append(("Epochs", f"{epoch:.2f}"))
    short = {"Time in steps": "Time", "Useful tokens per second": "Tokens/s", "Peak memory": "Peak memory"}
    rows.append((f"Loss, last {len(tail)} steps" if len(tail) > 1 else "Last loss", f"{fmean(tail):.3f}"))
    return [*rows, *((short[label], value) for label, value in _work(stage.steps) if label in short)]


def drop_rows(stages: Sequence[StageLog]) -> list[DropRow]:
    """Return the dropped records by stage and kind of reason (the part before the colon), most frequent first."""
    rows: list[DropRow] = []
    for stage in stages:
        kinds: dict[str, list[str]] = defaultdict(list)
        for record, reason in stage.dropped:
            kind, _, detail = reason.partition(":")
            example = displayed_answers(record, 40) + (f": {displayed_answers(detail, 160)}" if detail else "")
            kinds[displayed_answers(kind, 80)].append(example)
        ordered = sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0]))
        rows += [DropRow(stage.name, kind, len(every), _examples(every)) for kind, every in ordered[:_MOST_REASONS]]
        rest = sum(len(every) for _, every in ordered[_MOST_REASONS:])
        if rest:
            rows.append(DropRow(stage.name, f"{len(ordered) - _MOST_REASONS} other reasons", rest, ""))
    return rows


def _examples(every: Sequence[str]) -> str:
    """Return one long example or up to three short ones."""
    some = every[:1] if ":" in every[0] else every[:3]
    return ", ".join(some) + (", \N{HORIZONTAL ELLIPSIS}" if len(every) > len(some) else "")
