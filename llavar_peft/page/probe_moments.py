"""The looks at a run in order, under the names that a reader uses: before training, after stage1, ..."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llavar_peft.page.run_log import ProbeLog, StageLog

BEFORE = "before training"


@dataclass(frozen=True, slots=True)
class ProbeMoment:
    """A look with its name.

    Attributes:
        label: E.g. ``"before training"``, ``"after stage1"``, ``"stage2, step 40"``.
        stage: The stage that it belongs to.
        look: What was seen.
        main: Whether it is one of the few that tell the run: before, after each stage, and the latest.
        repeat: Whether it looks at the same weights as the stage before it did at its end.
    """

    label: str
    stage: StageLog
    look: ProbeLog
    main: bool
    repeat: bool = False

    @property
    def short(self) -> str:
        """The name where there is little room."""
        return "before" if self.label == BEFORE else self.label


def moments(stages: Sequence[StageLog]) -> tuple[ProbeMoment, ...]:
    """Return all looks of a run in order, with their names."""
    named: list[ProbeMoment] = []
    previous: ProbeLog | None = None
    for index, stage in enumerate(stages):
        named.extend(_moment(stage, look, first=index == 0, previous=previous) for look in stage.looks)
        previous = next((look for look in stage.looks if look.when == "end"), None)
    if named and named[-1].look.when == "step":
        last = named[-1]
        named[-1] = ProbeMoment(last.label, last.stage, last.look, main=True)
    return tuple(named)


def _moment(stage: StageLog, look: ProbeLog, *, first: bool, previous: ProbeLog | None) -> ProbeMoment:
    if look.when == "end":
        return ProbeMoment(f"after {stage.name}", stage, look, main=True)
    if look.when == "step":
        return ProbeMoment(f"{stage.name}, step {look.step:,}", stage, look, main=False)
    if first:
        return ProbeMoment(BEFORE, stage, look, main=True)
    repeat = previous is not None and same_records(previous, look)
    return ProbeMoment(f"start of {stage.name}", stage, look, main=not repeat, repeat=repeat)


def same_records(one: ProbeLog, other: ProbeLog) -> bool:
    """Whether two looks went over the same held-out records, as far as their lines tell."""
    keys, others = ({(at.id, at.question, at.truth) for at in look.samples} for look in (one, other))
    return one.count == other.count and (not keys or not others or keys == others)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval (Wilson's) of a share seen on ``count`` records."""
    z = 1.959964
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
