"""What a run wrote about itself, read back and checked.

A run may be under way while its files are read: a missing file, an empty one, or a last line that is not finished yet
is no fault. A broken line elsewhere is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from llavar_peft.errors import DataError
from llavar_peft.page.json_lines import MEND_LINE, JsonRecord, read_lines

When = Literal["start", "step", "end"]
_WHENS = ("start", "step", "end")
_MEND_FILE = "write the file again as the run writes it, or remove it"


@dataclass(frozen=True, slots=True)
class StepLine:
    """One optimizer step.

    Attributes:
        step: Number of the step within its stage.
        loss: Training loss; may be NaN or infinite.
        tokens: Tokens of the step, padding not counted; ``supervised_tokens`` are those that carry loss.
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
    """One held-out image read aloud; ``image`` is relative to the stage's folder."""

    id: str
    image: str | None
    question: str
    truth: str
    answer: str
    correct: bool


@dataclass(frozen=True, slots=True)
class ProbeLog:
    """One look at the held-out records; shares are between 0 and 1."""

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
    """What one stage wrote; ``dropped`` holds (record id, reason)."""

    name: str
    folder: Path
    steps: tuple[StepLine, ...]
    looks: tuple[ProbeLog, ...]
    dropped: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class RunLog:
    """What a run wrote; ``remarks`` says in words what could not be read yet."""

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


def _look(record: JsonRecord) -> ProbeLog:
    when = record.text("when")
    if when not in _WHENS:
        raise DataError.at(f"{record.where}:when", f"expected one of {', '.join(_WHENS)}, got {when!r}", MEND_LINE)
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
    """Read one stage's folder. Where a resumed stage wrote a step or a look twice, the later line counts."""
    steps = {line.step: line for line in map(_step_line, read_lines(folder / "metrics.jsonl"))}
    looks = {(look.step, _WHENS.index(look.when)): look for look in map(_look, read_lines(folder / "probe.jsonl"))}
    # Each rank of a run on several devices has its own file: dropped.jsonl, dropped.rank1.jsonl, ...
    lines = (item for path in sorted(folder.glob("dropped*.jsonl")) for item in read_lines(path))
    dropped = {item.text("id"): item.text("reason") for item in lines}
    return StageLog(
        name=folder.name,
        folder=folder,
        steps=tuple(steps[step] for step in sorted(steps)),
        looks=tuple(looks[key] for key in sorted(looks)),
        dropped=tuple(dropped.items()),
    )


def _whole_json(path: Path, remarks: list[str]) -> object:
    """Return a file's JSON value; None, with a remark, where it is not finished."""
    text = path.read_bytes().strip() if path.is_file() else b""
    try:
        return json.loads(text.decode("utf-8")) if text else None
    except ValueError:
        remarks.append(f"{path.name} is not complete and was left out.")
        return None


def _stage_folders(run_dir: Path, remarks: list[str]) -> list[Path]:
    """Return the stages' folders: those that ``stages.json`` lists, then others by the time of their last line."""
    listed = _whole_json(run_dir / "stages.json", remarks) or []
    if not isinstance(listed, list) or not all(map(_is_folder_name, listed)):
        raise DataError.at(str(run_dir / "stages.json"), "expected a list of the stages' folder names", _MEND_FILE)
    times: dict[Path, float] = {}
    for path in (*run_dir.glob("*/metrics.jsonl"), *run_dir.glob("*/probe.jsonl")):
        times[path.parent] = max(times.get(path.parent, 0.0), path.stat().st_mtime)
    others = [folder for folder in times if folder.name not in listed]
    others.sort(key=lambda folder: (times[folder], folder.name))
    return [run_dir / name for name in dict.fromkeys(listed)] + others


def _is_folder_name(name: object) -> bool:
    return isinstance(name, str) and name not in {"", ".."} and Path(name).name == name


def read_run(run_dir: Path) -> RunLog:
    """Read everything that a run wrote so far.

    Args:
        run_dir: The run's folder.

    Returns:
        Its stages, looks, recipe and versions, as far as they are there.

    Raises:
        DataError: There is no such folder, or a file holds something else than the run writes.
    """
    if not run_dir.is_dir():
        raise DataError.at(str(run_dir), "no such folder", "name the folder that the run wrote to")
    remarks: list[str] = []
    stages = tuple(read_stage(folder) for folder in _stage_folders(run_dir, remarks))
    versions = _whole_json(run_dir / "versions.json", remarks) or {}
    if not isinstance(versions, dict):
        raise DataError.at(str(run_dir / "versions.json"), "expected an object of names and versions", _MEND_FILE)
    rows = tuple((name, value if isinstance(value, str) else json.dumps(value)) for name, value in versions.items())
    recipe_file = run_dir / "recipe.yaml"
    recipe = recipe_file.read_text(encoding="utf-8", errors="replace") if recipe_file.is_file() else ""
    return RunLog(folder=run_dir, stages=stages, recipe=recipe, versions=rows, remarks=tuple(remarks))
