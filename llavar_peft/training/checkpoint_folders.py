"""Checkpoints that are whole or not there: written aside, hashed, synced, renamed, and verified before they are used.

Each has a ``manifest.json``, written last: its files' sizes and hashes, and what a run has to share to go on from it
(records, number of ranks). A checkpoint that does not match its manifest is set aside under a name that says so, and
the one before it is taken.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llavar_peft.atomic_files import commit_folder, write_json
from llavar_peft.errors import ConfigError, Fault

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
STAGING = ".staging"
MANIFEST = "manifest.json"
BROKEN = ".broken"
_BLOCK = 1 << 22
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large", "unexpected pos", "failed writing")
"""How writers that are not Python's say it: safetensors by its own error, torch.save by a RuntimeError."""


@dataclass(frozen=True)
class Origin:
    """What a run has to share with the one that wrote a checkpoint, to end where that one would have ended.

    Attributes:
        ranks: Number of processes.
        records: Hashes of the files that the stage's records come from.
    """

    ranks: int
    records: Mapping[str, str]


def origin_of(records: Iterable[str], *, ranks: int) -> Origin:
    """Look at a stage's files of records.

    Args:
        records: Files, or folders written by ``datasets``.
        ranks: Number of processes.

    Returns:
        Their hashes, by path.
    """
    found = {}
    for name in records:
        path = Path(name)
        parts = sorted(one for one in path.rglob("*") if one.is_file()) if path.is_dir() else [path]
        found.update({str(part): _hash(part) for part in parts})
    return Origin(ranks, found)


def checkpoints(directory: Path) -> list[Path]:
    """A stage's checkpoints, oldest first. What a killed run left in staging is none, nor is what was set aside."""
    found = [path for path in directory.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step that a checkpoint was taken after."""
    return int(checkpoint.name.removeprefix(PREFIX))


def write_manifest(staged: Path, final: Path, origin: Origin) -> None:
    """Return a checkpoint its manifest and then, at once, its name.

    Args:
        staged: The folder, complete.
        final: ``checkpoint-N`` beside the others.
        origin: Of the run.
    """
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        hashes = list(pool.map(_hash, files))
    entries = {
        path.relative_to(staged).as_posix(): {"bytes": path.stat().st_size, "blake2b": digest}
        for path, digest in zip(files, hashes, strict=True)
    }
    write_json(staged / MANIFEST, {"step": step_of(final), **asdict(origin), "files": entries})
    commit_folder(staged, final)


def find_checkpoint_fault(checkpoint: Path) -> str | None:
    """Read a checkpoint whole.

    Args:
        checkpoint: Its folder.

    Returns:
        What is wrong with it, or None.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        entries: dict[str, dict[str, Any]] = manifest["files"]
        Origin(int(manifest["ranks"]), dict(manifest["records"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"

    def check(item: tuple[str, dict[str, Any]]) -> str | None:
        name, entry = item
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}"
        return None if _hash(path) == entry["blake2b"] else f"{name} is damaged"

    with ThreadPoolExecutor() as pool:
        return next((fault for fault in pool.map(check, entries.items()) if fault), None)


def newest_good(directory: Path) -> Path | None:
    """Find where to go on, and sets aside what is broken.

    Args:
        directory: The stage's.

    Returns:
        The newest checkpoint that verifies; None where there is none.
    """
    for path in reversed(checkpoints(directory)):
        fault = find_checkpoint_fault(path)
        if fault is None:
            return path
        aside = path.with_name(path.name + BROKEN)
        number = 1
        while aside.exists():
            number += 1
            aside = path.with_name(f"{path.name}{BROKEN}-{number}")
        path.rename(aside)
        logger.warning("%s: %s; set aside as %s", path, fault, aside.name)
    return None


def check_same_run(checkpoint: Path, origin: Origin) -> None:
    """Compare a checkpoint's run with this one.

    Args:
        checkpoint: One that verifies.
        origin: Of this run.

    Raises:
        ConfigError: The records or the number of ranks changed.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    faults = []
    if manifest["ranks"] != origin.ranks:
        faults.append(Fault("ranks", f"was {manifest['ranks']}, is {origin.ranks}", ""))
    before: dict[str, str] = manifest["records"]
    # A folder that was moved is the same one; what counts is what the files hold, in their order.
    if list(before.values()) != list(origin.records.values()):
        changed = [name for name, digest in origin.records.items() if digest not in before.values()]
        gone = [name for name, digest in before.items() if digest not in origin.records.values()]
        faults.append(Fault("data.records", f"changed: {', '.join([*changed, *gone]) or 'their order'}", ""))
    if faults:
        lines = "\n".join(f"  {fault.where}: {fault.what}" for fault in faults)
        raise ConfigError(
            f"{checkpoint}: this run would not end where the one that it belongs to would have\n{lines}\n"
            "Fix: undo the change, pass --restart to begin anew, or --allow-changes to go on all the same.",
            faults,
        )


def rotate(directory: Path, keep: int) -> None:
    """Remove the oldest checkpoints; the newest, which was sealed just now, is never among them.

    Args:
        directory: The stage's.
        keep: How many are kept, at least 1.
    """
    for old in checkpoints(directory)[:-keep]:
        # Away under another name first: a kill in the middle must not leave half of one.
        doomed = old.with_name(f".{old.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        old.rename(doomed)
        shutil.rmtree(doomed)


def discard_unfinished(directory: Path) -> None:
    """Remove what saves and rotations that were cut off have left."""
    for path in [directory / STAGING, *directory.glob(f".{PREFIX}*")]:
        shutil.rmtree(path, ignore_errors=True)


def is_disk_full(error: BaseException) -> bool:
    """Whether a save failed for want of space, whichever library says so."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(text in str(error) for text in _FULL_TEXTS)


def _hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
