"""The JSON lines of a run, and the versions of the packages that it uses."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llavar_peft.atomic_files import disk_errors, write_text
from llavar_peft.text_files import read_json_lines

_PACKAGES = (
    "llavar_peft", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "flash_attn", "datasets", "pillow",
    "safetensors", "tokenizers", "numpy",
)  # fmt: skip


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON line to a file, completely or not at all.

    Raises:
        EnvironmentFaultError: The disk is full, or the file is not writable.
    """
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode()
    with disk_errors(path, needed=len(line)), path.open("ab", buffering=0) as file:
        end, written = file.tell(), 0
        try:
            while written < len(line):
                written += file.write(line[written:])
        except OSError:
            file.truncate(end)
            raise


def read_metric_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the values of a file of JSON lines, without an incomplete last line."""
    return (value for _, value in read_json_lines(path, unfinished=True))


def drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines of steps that a resumed run repeats."""
    if path.is_file():
        # A line that another program damaged has no step; the resumed run writes those that it repeats.
        lines = (
            line for line in read_metric_lines(path) if isinstance(line, dict) and isinstance(line.get("step"), int)
        )
        kept = [line for line in lines if line["step"] <= step]
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def describe_environment() -> dict[str, Any]:
    """Return the versions that a result depends on, and the git revision of the package."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "platform": platform.platform(), "git": git_revision(), **versions}


def git_revision() -> str | None:
    """Return the git revision of this package, with ``+changes`` if files changed; None outside a checkout."""
    here = Path(__file__).resolve().parent
    git = shutil.which("git")
    if git is None:
        return None

    def run_git(*arguments: str) -> str | None:
        done = subprocess.run([git, *arguments], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    revision = run_git("rev-parse", "HEAD")
    if revision is None:
        return None
    return revision + ("+changes" if run_git("status", "--porcelain", "--untracked-files=no", str(here)) else "")
