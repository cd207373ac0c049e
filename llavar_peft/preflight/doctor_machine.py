"""Where things are written, and what the system allows."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from llavar_peft.preflight.doctor_findings import DoctorFinding, fault_finding, note_finding, ok_finding

_GB = 1e9
_FULL_CHECKPOINT = 190
"""GB: a 13B model in full, fp32 weights and Adam's states, as one checkpoint holds it."""
_SHARED = 2**30
_FILES = 4096


def check_machine(output: Path) -> Iterator[DoctorFinding]:
    """Look at folders and limits.

    Args:
        output: Where runs are to be written; it need not exist.

    Yields:
        A finding each.
    """
    yield _folder("output folder", output, enough=_FULL_CHECKPOINT)
    from huggingface_hub.constants import HF_HUB_CACHE

    yield _folder("Hugging Face cache", Path(HF_HUB_CACHE), enough=30)
    yield _folder("temporary files", Path(tempfile.gettempdir()), enough=2)
    yield from _limits()
    yield _launcher()
    for program, use in (("tesseract", "ocr build --engine tesseract"),):
        found = shutil.which(program)
        yield ok_finding(program, found) if found else note_finding(program, "is missing", f"install it for {use}")


def _folder(name: str, path: Path, *, enough: float) -> DoctorFinding:
    """Whether one can write there; tried, as permissions alone do not tell (read-only mounts, quotas)."""
    there = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".doctor-") as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return fault_finding(
            name, f"{path} cannot be written ({error.strerror})", "give another folder, or its permissions"
        )
    free = shutil.disk_usage(there).free / _GB
    if free < 1:
        return fault_finding(name, f"{path}: {free:.1f} GB free", "make room")
    if free < enough:
        return note_finding(
            name, f"{path}: {free:.0f} GB free", f"a 13B model in full wants {enough:g} GB here; adapters less"
        )
    return ok_finding(name, f"{path}: {free:.0f} GB free")


def _limits() -> Iterator[DoctorFinding]:
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        if size < _SHARED:
            fix = "start the container with --shm-size 8g, or set stages.N.data.workers=0"
            yield note_finding(
                "shared memory", f"{size / 2**20:.0f} MiB in /dev/shm, which image workers hand pictures over by", fix
            )
        else:
            yield ok_finding("shared memory", f"{size / 2**30:.0f} GiB")
    if hasattr(psutil.Process(), "rlimit"):
        soft, _ = psutil.Process().rlimit(psutil.RLIMIT_NOFILE)
        if 0 <= soft < _FILES:
            yield note_finding("open files", f"at most {soft}", f"ulimit -n {_FILES}, if image workers run out of them")
        else:
            yield ok_finding("open files", f"at most {soft}")


def _launcher() -> DoctorFinding:
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if not Path(default_config_file).is_file():
        return ok_finding("accelerate", "has no settings of its own; give it --config_file examples/accelerate/*.yaml")
    try:
        settings = load_config_from_file(default_config_file)
    except Exception as error:  # noqa: BLE001 - a file of the user's; whatever is wrong with it
        return fault_finding(
            "accelerate", f"{default_config_file} cannot be read ({error})", "run accelerate config again"
        )
    return ok_finding(
        "accelerate", f"{default_config_file}: {settings.num_processes} processes, {settings.distributed_type}"
    )
