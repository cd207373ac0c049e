"""Checkpoint folders: written to a staging folder, hashed, synced and renamed; verified before they are used.

The last file written is ``manifest.json``: sizes and hashes of all files, and what a resumed run must share (records,
number of ranks). A checkpoint that does not match its manifest is renamed to ``*.broken``; the previous one is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from llavar_peft.atomic_files import commit_folder, write_json
from llavar_peft.errors import DAMAGED, ConfigError, Fault, describe_reason

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
STAGING = ".staging"
MANIFEST = "manifest.json"
BROKEN = ".broken"
_BLOCK = 1 << 22  # bytes that are hashed at once


@dataclass(frozen=True)
class RunInputs:
    """What a run must share with the run that wrote a checkpoint, so that resuming gives the same result.

    Attributes:
        ranks: Number of processes.
        records: Hashes of the stage's files of records, by path.
    """

    ranks: int
    records: Mapping[str, str]


def hash_inputs(records: Iterable[str], *, ranks: int) -> RunInputs:
    """Hash a stage's files of records; a folder of ``datasets`` counts with all its files."""
    hashes = {}
    for name in records:
        path = Path(name)
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        hashes.update({str(file): _hash(file) for file in files})
    return RunInputs(ranks, hashes)


def list_checkpoints(directory: Path) -> list[Path]:
    """Return a stage's checkpoints, oldest first, without unfinished and broken ones."""
    checkpoints = [path for path in directory.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(checkpoints, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Return the number of optimizer steps before a checkpoint."""
    return int(checkpoint.name.removeprefix(PREFIX))


def commit_checkpoint(staged: Path, final: Path, inputs: RunInputs) -> None:
    """Write the manifest of a complete checkpoint, then rename its staging folder to ``checkpoint-N``."""
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        hashes = list(pool.map(_hash, files))
    entries = {
        path.relative_to(staged).as_posix(): {"bytes": path.stat().st_size, "blake2b": digest}
        for path, digest in zip(files, hashes, strict=True)
    }
    write_json(staged / MANIFEST, {"step": checkpoint_step(final), **asdict(inputs), "files": entries})
    commit_folder(staged, final)


def find_checkpoint_fault(checkpoint: Path) -> str | None:
    """Compare every file of a checkpoint with its manifest, and return the first fault or None."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        entries: dict[str, dict[str, Any]] = manifest["files"]
        RunInputs(int(manifest["ranks"]), dict(manifest["records"]))
        for name, entry in entries.items():
            _ = entry["bytes"], entry["blake2b"]
            if not (checkpoint / name).resolve().is_relative_to(checkpoint.resolve()):
                raise ValueError(f"it names {name[:80]!a} outside the checkpoint")
    except DAMAGED as error:
        return f"{MANIFEST} cannot be read ({describe_reason(error)})"

    def check(item: tuple[str, dict[str, Any]]) -> str | None:
        name, entry = item
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} is incomplete (got {path.stat().st_size} bytes, expected {entry['bytes']})"
        return None if _hash(path) == entry["blake2b"] else f"{name} is damaged"

    with ThreadPoolExecutor() as pool:
        return next((fault for fault in pool.map(check, entries.items()) if fault), None)


def newest_valid_checkpoint(directory: Path) -> Path | None:
    """Return a stage's newest checkpoint that matches its manifest, or None; rename those that do not match."""
    for path in reversed(list_checkpoints(directory)):
        fault = find_checkpoint_fault(path)
        if fault is None:
            return path
        renamed = path.with_name(path.name + BROKEN)
        number = 1
        while renamed.exists():
            number += 1
            renamed = path.with_name(f"{path.name}{BROKEN}-{number}")
        path.rename(renamed)
        logger.warning("%s: %s; renamed to %s", path, fault, renamed.name)
    return None


def check_same_inputs(checkpoint: Path, inputs: RunInputs) -> None:
    """Check that a run has the same inputs as the run that wrote a valid checkpoint.

    Raises:
        ConfigError: The records or the number of ranks changed.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    faults = []
    if manifest["ranks"] != inputs.ranks:
        faults.append(Fault("ranks", f"changed (was {manifest['ranks']}, is {inputs.ranks})", ""))
    before: dict[str, str] = manifest["records"]
    # Files may have moved: their contents and order count, not their paths.
    if list(before.values()) != list(inputs.records.values()):
        changed = [name for name, digest in inputs.records.items() if digest not in before.values()]
        removed = [name for name, digest in before.items() if digest not in inputs.records.values()]
        faults.append(Fault("data.records", f"changed: {', '.join([*changed, *removed]) or 'their order'}", ""))
    if faults:
        lines = "\n".join(f"  {fault.where}: {fault.what}" for fault in faults)
        raise ConfigError(
            f"{checkpoint}: resuming with changed inputs would give another result\n{lines}\n"
            "Fix: undo the change, pass --restart to start again, or --allow-changes to resume anyway.",
            faults,
        )


def find_resume_point(
    directory: Path, inputs: RunInputs, processes: PartialState, *, allow_changes: bool
) -> Path | None:
    """Return the checkpoint that a stage resumes from, after removing what is unfinished. Every rank must call this.

    Raises:
        ConfigError: The checkpoint comes from a run with other inputs.
    """
    if processes.is_main_process:
        remove_unfinished(directory)
        newest_valid_checkpoint(directory)
    processes.wait_for_everyone()
    checkpoints = list_checkpoints(directory)  # rank 0 has renamed those that are broken
    if not checkpoints:
        return None
    newest = checkpoints[-1]
    if not allow_changes:
        check_same_inputs(newest, inputs)
    return newest


def remove_old_checkpoints(directory: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints of a stage, at least 1."""
    for old in list_checkpoints(directory)[:-keep]:
        # Rename first: a kill during the removal must not leave part of a checkpoint.
        hidden = old.with_name(f".{old.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        old.rename(hidden)
        shutil.rmtree(hidden)


def remove_unfinished(directory: Path) -> None:
    """Remove what interrupted saves and removals have left in a stage's folder."""
    for path in [directory / STAGING, *directory.glob(f".{PREFIX}*")]:
        shutil.rmtree(path, ignore_errors=True)


def _hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
