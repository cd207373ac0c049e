"""The figures of a page: headline, table of looks, each stage's facts and charts, dropped records."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from llavar_peft.page.charts import Chart, Point, Series, accuracy_chart, loss_chart, plain_chart
from llavar_peft.page.image_gallery import displayed_answers
from llavar_peft.page.probe_moments import ProbeMoment, wilson
from llavar_peft.page.run_log import ProbeLog, StageLog, StepLine

_DASH = "\N{EN DASH}"
_MOST_REASONS = 12


@dataclass(frozen=True, slots=True)
class HeadFigure:
    """One of the large figures: exact match at a look, and the control with blanked images."""

    label: str
    share: float
    control: float | None
    count: int


@dataclass(frozen=True, slots=True)
class StageView:
    """A stage ready to show."""

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
    """How many records a stage dropped for one reason, with a few of them."""

    stage: str
    reason: str
    count: int
    examples: str


def percent(share: float | None) -> str:
    """Return a share as a percentage with one decimal; a dash where there is none."""
    return _DASH if share is None or not math.isfinite(share) else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def duration(seconds: float) -> str:
    """Return a duration in its two leading units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def headline(looks: Sequence[ProbeMoment]) -> tuple[HeadFigure, ...]:
    """Return the large figures: exact match before training, after each stage, and at the latest look."""
    return tuple(
        HeadFigure(moment.label, moment.look.exact_match, moment.look.blank_exact_match, moment.look.count)
        for moment in looks
        if moment.main and moment.look.exact_match is not None
    )


def on_other_records(looks: Sequence[ProbeMoment]) -> str:
    """Return the names of the stages that were probed on other records than the stage before; empty if none was."""
    names = [one.stage.name for one in looks if one.main and one.look.when == "start"]
    return ", ".join(names[1:])


def look_rows(looks: Sequence[ProbeMoment]) -> list[list[tuple[str, str]]]:
    """Return the table of the main looks, cells as (column, value); a column that nothing fills is left out."""
    rows: list[list[tuple[str, str]]] = []
    for moment in looks:
        look = moment.look
        if not moment.main:
            continue
        span = _DASH
        if look.exact_match is not None and look.count > 0 and 0 <= look.exact_match <= 1:
            low, high = wilson(look.exact_match, look.count)
            span = f"{100 * low:.1f}{_DASH}{100 * high:.1f}"
        held = look.held_out_loss
        rows.append(
            [
                ("Look", moment.label),
                ("Exact match", percent(look.exact_match)),
                ("Interval", span),
                ("Characters", percent(look.character_accuracy)),
                ("Blanked", percent(look.blank_exact_match)),
                ("Held-out loss", _DASH if held is None else f"{held:.3f}"),
                ("Pictures", f"{look.count:,}"),
            ]
        )
    filled = {column for row in rows for column, value in row if value != _DASH}
    return [[cell for cell in row if cell[0] in filled] for row in rows]


def run_figures(stages: Sequence[StageLog]) -> list[tuple[str, str]]:
    """Return the smaller figures of the whole run as (label, value)."""
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
    """Return one stage's facts and charts."""
    looks = stage.looks
    last = max([step.step for step in stage.steps[-1:]] + [look.step for look in looks[-1:]] + [1])
    held = [(float(look.step), look.held_out_loss) for look in looks if look.held_out_loss is not None]
    series = [
        Series("exact", "exact match", _shares(looks, lambda look: look.exact_match), dots=True),
        Series("chars", "characters", _shares(looks, lambda look: look.character_accuracy), dots=True),
        Series("blank", "blanked picture", _shares(looks, lambda look: look.blank_exact_match), dots=True),
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


def _shares(looks: Sequence[ProbeLog], share: Callable[[ProbeLog], float | None]) -> list[Point]:
    values = [(float(look.step), share(look)) for look in looks]
    return [(step, value) for step, value in values if value is not None]


def _state(stage: StageLog) -> str:
    if not stage.steps:
        return "not a step yet"
    return "" if not stage.looks or stage.looks[-1].when == "end" else "no look at its end yet"


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
    """Return the dropped records by stage and kind of reason (what stands before its colon), frequent ones first."""
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
    """Return one long example, or up to three short ones."""
    some = every[:1] if ":" in every[0] else every[:3]
    return ", ".join(some) + (", \N{HORIZONTAL ELLIPSIS}" if len(every) > len(some) else "")
