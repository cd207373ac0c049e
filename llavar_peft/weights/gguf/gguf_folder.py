"""A folder of GGUF files that appears completely or not at all."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavar_peft.atomic_files import check_output_folder, commit_folder, disk_errors, hold_lock
from llavar_peft.errors import InterruptedRunError
from llavar_peft.weights.gguf.gguf_tensors import GgufTensor, write_gguf
from llavar_peft.weights.io.folder_writer import WeightsReport, check_is_new
from llavar_peft.weights.io.write_weights import Progress


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A file to be written.

    Attributes:
        name: Its name in the folder.
        architecture: Its ``general.architecture``.
        describe: Adds the other fields to the library's writer.
        tensors: In the order of the file.
    """

    name: str
    architecture: str
    describe: Callable[[Any], None]
    tensors: Sequence[GgufTensor]


def write_gguf_folder(out: Path, files: Sequence[GgufFile], progress: Progress | None = None) -> WeightsReport:
    """Write files to a new folder; a few blocks of one tensor, or the rows of one attention, are in memory.

    Args:
        out: The folder to create.
        files: Its files.
        progress: Called after each tensor with the number of bytes written and the total.

    Raises:
        ConfigError: The folder exists, or its path leads through a file.
        WeightsError: A tensor is damaged, not finite, or exceeds the range of the stored numbers.
        InterruptedRunError: Ctrl-C; nothing is kept.
        EnvironmentFaultError: The disk is full, or another process writes the same folder; nothing is kept.
    """
    check_is_new(out)
    started, staged = time.perf_counter(), out.with_name(f".{out.name}.part")
    total, done = sum(one.nbytes for file in files for one in file.tensors), 0
    check_output_folder(out, str(out))
    with hold_lock(out.with_name(f".{out.name}.lock"), where=out):
        check_is_new(out)  # another process may have finished it before this one got the lock
        try:
            with disk_errors(out, needed=total):
                shutil.rmtree(staged, ignore_errors=True)
                staged.mkdir(parents=True)
                for file in files:
                    for size in write_gguf(staged / file.name, file.architecture, file.describe, file.tensors):
                        done += size
                        if progress is not None:
                            progress(done, total)
                commit_folder(staged, out)
        except KeyboardInterrupt:
            raise InterruptedRunError.at(
                str(out), "interrupted before it was complete; nothing was kept", "run the same command again"
            ) from None
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return WeightsReport(out, sum(len(file.tensors) for file in files), total, time.perf_counter() - started)
