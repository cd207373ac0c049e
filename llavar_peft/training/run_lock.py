"""One run at a time in a folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from llavar_peft.errors import EnvironmentFaultError

LOCK_FILE = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder; a process that dies lets go of it.

    Args:
        folder: Made if it is not there.

    Yields:
        While it is held.

    Raises:
        EnvironmentFaultError: Another process holds it; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    while True:
        with path.open("a+", encoding="utf-8") as file:
            _take(file, folder)
            if not (path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))):
                continue  # the one who held it let go, and took the file away, in between
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _take(file: IO[str], folder: Path) -> None:
    with suppress(ImportError):  # Windows: two runs at once are the user's to avoid
        import fcntl

        try:
            # Not flock: a killed run's workers would go on holding it for a while.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            what = f"another run is at work in this folder ({holder})"
            raise EnvironmentFaultError.at(str(folder), what, "wait for it, or take another output_dir") from None
