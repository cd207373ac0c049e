"""Files and folders that are written atomically: under a temporary name, synchronized to disk, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any


def staging_path(path: Path) -> Path:
    """Return the temporary name of a file; it is always the same, so that leftovers of a killed run are replaced."""
    return path.with_name(f".{path.name}.part")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = staging_path(path)
    with staged.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 atomically; halves of characters, as in file names that are not UTF-8, become escapes."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON atomically."""
    write_text(path, dump_json(value, indent=2) + "\n")


def dump_json(value: Any, *, indent: int | None = None, separators: tuple[str, str] | None = None) -> str:
    """Format a value as JSON; characters outside ASCII are escaped only if the text cannot be encoded otherwise."""
    text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which has no UTF-8 form
        return json.dumps(value, indent=indent, separators=separators)
    return text


def commit_folder(staged: Path, final: Path) -> None:
    """Move a finished folder to its final name, replacing any folder of that name."""
    files = [entry for entry in sorted(staged.rglob("*")) if entry.is_file()]
    mode = _default_mode(staged)
    for entry in files:
        if entry.suffix == ".safetensors":
            # safetensors creates its files for their owner alone, whatever the umask.
            entry.chmod(mode)
        with entry.open("rb") as file:
            os.fsync(file.fileno())
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    staged.rename(final)
    _sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _default_mode(folder: Path) -> int:
    """Return the permissions that the umask gives a new file; ``os.umask`` can only read them by changing them."""
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
