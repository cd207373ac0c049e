"""Writes a stage's checkpoints from all ranks together, and handles a full disk."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

from llavar_peft.atomic_files import is_disk_full
from llavar_peft.errors import EnvironmentFaultError
from llavar_peft.models.rank_agreement import on_any_rank
from llavar_peft.training.checkpoint_folders import (
    PREFIX,
    STAGING,
    RunInputs,
    commit_checkpoint,
    newest_valid_checkpoint,
    remove_old_checkpoints,
    remove_unfinished,
)

logger = logging.getLogger(__name__)

_WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
_FIX = "free some space and run the same command again"


@contextmanager
def explain_full_disk(final: Path, staged: Path) -> Iterator[None]:
    """Name the result that did not fit on the disk, and remove the staging folder that is written inside the context.

    Raises:
        EnvironmentFaultError: The disk is full.
    """
    try:
        yield
    except _WRITE_ERRORS as error:
        if not is_disk_full(error):
            raise
        shutil.rmtree(staged, ignore_errors=True)
        raise EnvironmentFaultError.at(str(final), "not saved, the disk is full", _FIX) from error


class CheckpointWriter:
    """Writes to a staging folder, which rank 0 renames after all ranks have written.

    On a full disk the unfinished checkpoint is removed and the training continues. The run stops if the next checkpoint
    fails as well.

    Args:
        directory: The folder of the stage.
        inputs: What a resumed run must share with this one.
        keep: Number of checkpoints to keep.
        accelerator: The accelerator of the run.
    """

    def __init__(self, directory: Path, inputs: RunInputs, *, keep: int, accelerator: Accelerator) -> None:
        self.directory = directory
        self.inputs = inputs
        self.keep = keep
        self.accelerator = accelerator
        self.failures = 0

    def write(self, step: int, save: Callable[[Path], None], *, ending: bool) -> None:
        """Write one checkpoint. Every rank must call this.

        Args:
            step: Number of optimizer steps done.
            save: Writes this rank's files into the folder that it is given.
            ending: Whether the run stops afterwards, so that a failure cannot be repaired by a later checkpoint.

        Raises:
            EnvironmentFaultError: The disk is full, and it was full the last time or the run is ending.
        """
        final = self.directory / f"{PREFIX}{step}"
        staged = self.directory / STAGING / final.name
        main = self.accelerator.is_main_process

        def commit() -> None:
            if main:
                commit_checkpoint(staged, final, self.inputs)

        if main:
            remove_unfinished(self.directory)
        self.accelerator.wait_for_everyone()
        failed = self._disk_is_full(lambda: save(staged)) or self._disk_is_full(commit)
        if main:
            remove_unfinished(self.directory)
            if not failed:
                remove_old_checkpoints(self.directory, self.keep)
        self.accelerator.wait_for_everyone()
        self.failures = self.failures + 1 if failed else 0
        if failed:
            self._report_failure(final, stop=ending or self.failures > 1)

    def _disk_is_full(self, write: Callable[[], None]) -> bool:
        """Run ``write`` and return whether the disk was full on any rank; all ranks wait for each other here."""
        full = False
        try:
            write()
        except _WRITE_ERRORS as error:
            if not is_disk_full(error):
                raise
            logger.debug("not saved", exc_info=True)
            full = True
        return on_any_rank(full)

    def _report_failure(self, path: Path, *, stop: bool) -> None:
        last = newest_valid_checkpoint(self.directory) if self.accelerator.is_main_process else None
        kept = f"{last.name} is kept" if last else "there is no earlier one"
        if stop:
            raise EnvironmentFaultError.at(str(path), f"not saved, the disk is full; {kept}", _FIX)
        logger.warning("%s: not saved, the disk is full; %s; training continues", path, kept)
