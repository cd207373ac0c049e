"""Read and validate the files that a run writes about itself.

The run may still be writing: a missing or empty file and an incomplete last line are accepted, other malformed lines
are not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from llavar_peft.errors import DAMAGED, DataError, describe_reason
from llavar_peft.text_files import read_json_lines

When = Literal["start", "step", "end"]
_WHENS = ("start", "step", "end")
_T = TypeVar("_T")
_FIX_LINE = "remove the line, or copy the file from the run again"
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
    learning_rate: float | None = None
    epoch: float | None = None
    tokens: float | None = None
    supervised_tokens: float | None = None
    seconds: float | None = None
    peak_memory_mb: float | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """The answer to one held-out question; ``image`` is relative to the folder of the stage."""

    id: str
    question: str
    truth: str
    answer: str
    correct: bool
    image: str | None = None


@dataclass(frozen=True, slots=True)
class ProbeLog:
    """The results of one probe, which is an evaluation on held-out records; shares are between 0 and 1."""

    step: int
    when: When
    count: int
    held_out_loss: float | None = None
    exact_match: float | None = None
    character_accuracy: float | None = None
    blank_exact_match: float | None = None
    samples: tuple[Sample, ...] = ()


@dataclass(frozen=True, slots=True)
class DroppedRecord:
    """A record that was left out of training."""

    id: str
    reason: str


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


def _read_lines(path: Path, kind: type[_T]) -> Iterator[_T]:
    """Yield the lines of a JSON Lines file as ``kind``, without an incomplete last line."""
    for where, value in read_json_lines(path, fix=_FIX_LINE, unfinished=True):
        try:
            yield msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise DataError.at(where, f"unexpected content ({describe_reason(error)})", _FIX_LINE) from error


def read_stage(folder: Path) -> StageLog:
    """Read the folder of a stage. If a resumed stage wrote a step or a probe twice, the later line counts."""
    steps = {line.step: line for line in _read_lines(folder / "metrics.jsonl", StepLine)}
    probes = {(one.step, _WHENS.index(one.when)): one for one in _read_lines(folder / "probe.jsonl", ProbeLog)}
    # Each rank of a run on several devices writes its own file: dropped.jsonl, dropped.rank1.jsonl, ...
    files = sorted(folder.glob("dropped*.jsonl"))
    dropped = {one.id: one.reason for path in files for one in _read_lines(path, DroppedRecord)}
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
    except DAMAGED:
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
