"""The probes of a run in order, with their names: before training, after stage1, ..."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llavar_peft.page.run_log import ProbeLog, StageLog


@dataclass(frozen=True, slots=True)
class NamedProbe:
    """A probe with its name.

    Attributes:
        label: E.g. ``"before training"``, ``"after stage1"``, ``"stage2, step 40"``.
        stage: The stage that the probe belongs to.
        probe: Its results.
        main: Whether it summarizes the run: the probes before training and after each stage, and the latest one.
        repeat: Whether it evaluates the same weights on the same records as the end of the stage before.
    """

    label: str
    stage: StageLog
    probe: ProbeLog
    main: bool
    repeat: bool = False


def named_probes(stages: Sequence[StageLog]) -> tuple[NamedProbe, ...]:
    """Return all probes of a run in order, with their names."""
    named: list[NamedProbe] = []
    previous: ProbeLog | None = None
    for index, stage in enumerate(stages):
        named.extend(_name(stage, probe, first=index == 0, previous=previous) for probe in stage.probes)
        previous = next((probe for probe in stage.probes if probe.when == "end"), None)
    if named and named[-1].probe.when == "step":
        last = named[-1]
        named[-1] = NamedProbe(last.label, last.stage, last.probe, main=True)
    return tuple(named)


def _name(stage: StageLog, probe: ProbeLog, *, first: bool, previous: ProbeLog | None) -> NamedProbe:
    if probe.when == "end":
        return NamedProbe(f"after {stage.name}", stage, probe, main=True)
    if probe.when == "step":
        return NamedProbe(f"{stage.name}, step {probe.step:,}", stage, probe, main=False)
    if first:
        return NamedProbe("before training", stage, probe, main=True)
    repeat = previous is not None and _same_records(previous, probe)
    return NamedProbe(f"start of {stage.name}", stage, probe, main=not repeat, repeat=repeat)


def _same_records(one: ProbeLog, other: ProbeLog) -> bool:
    """Return whether two probes used the same held-out records, as far as their samples show."""
    keys, others = ({(at.id, at.question, at.truth) for at in probe.samples} for probe in (one, other))
    return one.count == other.count and (not keys or not others or keys == others)
