"""Read and validate the files that a run writes about itself.

The run may still be writing: a missing or empty file and an incomplete last line are accepted, other malformed lines
are not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from llavar_peft.errors import DataError
from llavar_peft.page.json_lines import FIX_LINE, JsonRecord, read_lines

When = Literal["start", "step", "end"]
_WHENS = ("start", "step", "end")
_FIX_FILE = "restore the file that the run wrote, or remove it"


@dataclass(frozen=True, slots=True)
class StepLine:
    """One optimizer step.

    Attributes:
        step: Number of the step in its stage.
        loss: Training loss; may be NaN or infinite.
        tokens: Number of tokens without padding.
        supervised_tokens: Number of tokens that carry loss.
        peak_memory_mb: Peak device memory so far.
    """

    step: int
    loss: float
    learning_rate: float | None
    epoch: float | None
    tokens: float | None
    supervised_tokens: float | None
    seconds: float | None
    peak_memory_mb: float | None


@dataclass(frozen=True, slots=True)
class Sample:
    """The answer to one held-out question; ``image`` is relative to the folder of the stage."""

    id: str
    image: str | None
    question: str
    truth: str
    answer: str
    correct: bool


@dataclass(frozen=True, slots=True)
class ProbeLog:
    """The results of one probe, which is an evaluation on held-out records; shares are between 0 and 1."""

    step: int
    when: When
    held_out_loss: float | None
    exact_match: float | None
    character_accuracy: float | None
    count: int
    blank_exact_match: float | None
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class StageLog:
    """The files of one stage; ``dropped`` contains (record id, reason)."""

    name: str
    folder: Path
    steps: tuple[StepLine, ...]
    probes: tuple[ProbeLog, ...]
    dropped: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class RunLog:
    """The files of a run; ``remarks`` lists in words what could not be read yet."""

    folder: Path
    stages: tuple[StageLog, ...]
    recipe: str
    versions: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...]


def _step_line(record: JsonRecord) -> StepLine:
    return StepLine(
        step=record.integer("step"),
        loss=record.number("loss"),
        learning_rate=record.optional_number("learning_rate"),
        epoch=record.optional_number("epoch"),
        tokens=record.optional_number("tokens"),
        supervised_tokens=record.optional_number("supervised_tokens"),
        seconds=record.optional_number("seconds"),
        peak_memory_mb=record.optional_number("peak_memory_mb"),
    )


def _probe(record: JsonRecord) -> ProbeLog:
    when = record.text("when")
    if when not in _WHENS:
        raise DataError.at(
            f"{record.where}:when", f"wrong value (got {when!r}, expected one of {', '.join(_WHENS)})", FIX_LINE
        )
    samples = tuple(
        Sample(
            id=item.text("id"),
            image=item.optional_text("image"),
            question=item.text("question"),
            truth=item.text("truth"),
            answer=item.text("answer"),
            correct=item.flag("correct"),
        )
        for item in record.records("samples")
    )
    return ProbeLog(
        step=record.integer("step"),
        when=cast("When", when),
        held_out_loss=record.optional_number("held_out_loss"),
        exact_match=record.optional_number("exact_match"),
        character_accuracy=record.optional_number("character_accuracy"),
        count=record.integer("count"),
        blank_exact_match=record.optional_number("blank_exact_match"),
        samples=samples,
    )


def read_stage(folder: Path) -> StageLog:
    """Read the folder of a stage. If a resumed stage wrote a step or a probe twice, the later line counts."""
    steps = {line.step: line for line in map(_step_line, read_lines(folder / "metrics.jsonl"))}
    probes = {(one.step, _WHENS.index(one.when)): one for one in map(_probe, read_lines(folder / "probe.jsonl"))}
    # Each rank of a run on several devices writes its own file: dropped.jsonl, dropped.rank1.jsonl, ...
    lines = (item for path in sorted(folder.glob("dropped*.jsonl")) for item in read_lines(path))
    dropped = {item.text("id"): item.text("reason") for item in lines}
    return StageLog(
        name=folder.name,
        folder=folder,
        steps=tuple(steps[step] for step in sorted(steps)),
        probes=tuple(probes[key] for key in sorted(probes)),
        dropped=tuple(dropped.items()),
    )


def _read_json(path: Path, remarks: list[str]) -> object:
    """Return the JSON value of a file; None, with a remark, if the file is incomplete."""
    text = path.read_bytes().strip() if path.is_file() else b""
    try:
        return json.loads(text.decode("utf-8")) if text else None
    except ValueError:
        remarks.append(f"{path.name} is incomplete and was ignored.")
        return None


def _stage_folders(run_dir: Path, remarks: list[str]) -> list[Path]:
    """Return the folders of the stages: those in ``stages.json``, then the others by the time of their last line."""
    listed = _read_json(run_dir / "stages.json", remarks) or []
    if not isinstance(listed, list) or not all(map(_is_folder_name, listed)):
        raise DataError.at(
            str(run_dir / "stages.json"), "wrong content (expected a list of the stages' folder names)", _FIX_FILE
        )
    times: dict[Path, float] = {}
    for path in (*run_dir.glob("*/metrics.jsonl"), *run_dir.glob("*/probe.jsonl")):
        times[path.parent] = max(times.get(path.parent, 0.0), path.stat().st_mtime)
    others = [folder for folder in times if folder.name not in listed]
    others.sort(key=lambda folder: (times[folder], folder.name))
    return [run_dir / name for name in dict.fromkeys(listed)] + others


def _is_folder_name(name: object) -> bool:
    return isinstance(name, str) and name not in {"", ".."} and Path(name).name == name


def read_run(run_dir: Path) -> RunLog:
    """Read everything that a run has written so far to its folder.

    Raises:
        DataError: There is no such folder, or a file has content that no run writes.
    """
    if not run_dir.is_dir():
        raise DataError.at(str(run_dir), "no such folder", "give the output folder of a run")
    remarks: list[str] = []
    stages = tuple(read_stage(folder) for folder in _stage_folders(run_dir, remarks))
    versions = _read_json(run_dir / "versions.json", remarks) or {}
    if not isinstance(versions, dict):
        raise DataError.at(
            str(run_dir / "versions.json"), "wrong content (expected an object of names and versions)", _FIX_FILE
        )
    rows = tuple((name, value if isinstance(value, str) else json.dumps(value)) for name, value in versions.items())
    recipe_file = run_dir / "recipe.yaml"
    recipe = recipe_file.read_text(encoding="utf-8", errors="replace") if recipe_file.is_file() else ""
    return RunLog(folder=run_dir, stages=stages, recipe=recipe, versions=rows, remarks=tuple(remarks))
