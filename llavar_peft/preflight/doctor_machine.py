"""Checks of the folders that are written, and of the system's limits."""

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
"""GB of a checkpoint of a fully trained 13B model: fp32 weights and Adam's states."""
_SHARED_MEMORY = 2**30
_OPEN_FILES = 4096


def check_machine(output: Path) -> Iterator[DoctorFinding]:
    """Check folders, limits and programs.

    Args:
        output: The folder for runs; it need not exist.
    """
    yield _folder("output folder", output, enough=_FULL_CHECKPOINT)
    from huggingface_hub.constants import HF_HUB_CACHE

    yield _folder("Hugging Face cache", Path(HF_HUB_CACHE), enough=30)
    yield _folder("temporary files", Path(tempfile.gettempdir()), enough=2)
    yield from _limits()
    yield _launcher()
    tesseract = shutil.which("tesseract")
    if tesseract:
        yield ok_finding("tesseract", tesseract)
    else:
        yield note_finding("tesseract", "is not installed", "install it to use ocr build --engine tesseract")


def _folder(name: str, path: Path, *, enough: float) -> DoctorFinding:
    """Write a file to a folder; its permissions do not show read-only mounts and quotas."""
    existing = next(one for one in (path.absolute(), *path.absolute().parents) if one.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".doctor-") as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return fault_finding(
            name, f"{path} cannot be written ({error.strerror})", "use another folder, or change its permissions"
        )
    free = shutil.disk_usage(existing).free / _GB
    if free < 1:
        return fault_finding(name, f"{path}: {free:.1f} GB free", "free disk space")
    if free < enough:
        return note_finding(
            name,
            f"{path}: {free:.0f} GB free",
            f"a 13B model that is trained in full needs up to {enough:g} GB; adapters need less",
        )
    return ok_finding(name, f"{path}: {free:.0f} GB free")


def _limits() -> Iterator[DoctorFinding]:
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total
        if size < _SHARED_MEMORY:
            fix = "start the container with --shm-size 8g, or set stages.N.data.workers=0"
            yield note_finding("shared memory", f"{size / 2**20:.0f} MiB in /dev/shm, which image workers need", fix)
        else:
            yield ok_finding("shared memory", f"{size / 2**30:.0f} GiB")
    if hasattr(psutil.Process(), "rlimit"):
        soft, _ = psutil.Process().rlimit(psutil.RLIMIT_NOFILE)
        if 0 <= soft < _OPEN_FILES:
            yield note_finding(
                "open files",
                f"at most {soft}",
                f"run ulimit -n {_OPEN_FILES} if image workers fail with too many open files",
            )
        else:
            yield ok_finding("open files", f"at most {soft}")


def _launcher() -> DoctorFinding:
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    if not Path(default_config_file).is_file():
        return ok_finding("accelerate", "has no default configuration; use --config_file examples/accelerate/*.yaml")
    try:
        settings = load_config_from_file(default_config_file)
    except Exception as error:  # noqa: BLE001 - the user's file may be invalid in any way
        return fault_finding(
            "accelerate", f"{default_config_file} cannot be read ({error})", "run accelerate config again"
        )
    return ok_finding(
        "accelerate", f"{default_config_file}: {settings.num_processes} processes, {settings.distributed_type}"
    )
