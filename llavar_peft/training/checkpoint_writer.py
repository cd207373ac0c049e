"""Saves a stage's checkpoints, all ranks together, and survives a full disk."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

from llavar_peft.errors import EnvironmentFaultError
from llavar_peft.training.checkpoint_folders import (
    PREFIX,
    STAGING,
    Origin,
    discard_unfinished,
    is_disk_full,
    newest_good,
    rotate,
    write_manifest,
)
from llavar_peft.training.rank_agreement import on_any_rank

logger = logging.getLogger(__name__)

_WRITING = (OSError, RuntimeError, SafetensorError)
_MEND = "free some space and run the same command again"


@contextmanager
def named_if_full(final: Path, staged: Path) -> Iterator[None]:
    """Say which result did not fit on the disk, and takes away what there is of it.

    Args:
        final: The folder that was to appear.
        staged: Where it is written.

    Yields:
        While it is written.

    Raises:
        EnvironmentFaultError: The disk is full.
    """
    try:
        yield
    except _WRITING as error:
        if not is_disk_full(error):
            raise
        shutil.rmtree(staged, ignore_errors=True)
        raise EnvironmentFaultError.at(str(final), "not saved, the disk is full", _MEND) from error


class CheckpointWriter:
    """Writes aside; rank 0 gives a checkpoint its name after all ranks have written.

    On a full disk the unfinished checkpoint goes, and the run goes on. If the next one fails too, the run stops.

    Args:
        directory: The stage's.
        origin: What a run that goes on from a checkpoint has to share.
        keep: How many are kept.
        accelerator: The run's.
    """

    def __init__(self, directory: Path, origin: Origin, *, keep: int, accelerator: Accelerator) -> None:
        self.directory = directory
        self.origin = origin
        self.keep = keep
        self.accelerator = accelerator
        self.failures = 0

    def write(self, step: int, save: Callable[[Path], None], *, ending: bool) -> None:
        """Save one checkpoint.

        Args:
            step: Optimizer steps done.
            save: Writes this rank's part below the folder that it is given, in ``checkpoint-N``.
            ending: Whether the run stops after this; then there is no next one.

        Raises:
            EnvironmentFaultError: The disk is full, and was so the last time, or the run is ending.
        """
        staging, name = self.directory / STAGING, f"{PREFIX}{step}"
        main = self.accelerator.is_main_process

        def settle() -> None:
            if main:
                write_manifest(staging / name, self.directory / name, self.origin)

        if main:
            discard_unfinished(self.directory)
        self.accelerator.wait_for_everyone()
        failed = self._fails_for_space(lambda: save(staging)) or self._fails_for_space(settle)
        if main:
            discard_unfinished(self.directory)
            if not failed:
                rotate(self.directory, self.keep)
        self.accelerator.wait_for_everyone()
        self.failures = self.failures + 1 if failed else 0
        if failed:
            self._say_unsaved(self.directory / name, give_up=ending or self.failures > 1)

    def _fails_for_space(self, act: Callable[[], None]) -> bool:
        """Whether the disk was too full for it, on any rank; the ranks meet here."""
        full = False
        try:
            act()
        except _WRITING as error:
            if not is_disk_full(error):
                raise
            logger.debug("not saved", exc_info=True)
            full = True
        return on_any_rank(full, self.accelerator.device)

    def _say_unsaved(self, path: Path, *, give_up: bool) -> None:
        last = newest_good(self.directory) if self.accelerator.is_main_process else None
        kept = f"{last.name} is kept" if last else "there is no earlier one"
        if give_up:
            raise EnvironmentFaultError.at(str(path), f"not saved, the disk is full; {kept}", _MEND)
        logger.warning("%s: not saved, the disk is full; %s; training goes on", path, kept)
