"""What was paid for once, kept line by line, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from llavar_peft.atomic_files import dump_json
from llavar_peft.errors import DataError, EnvironmentFaultError


class ResumeJournal:
    """A file of JSON lines that only grows: a heading, then one entry each.

    A last line that a crash cut off is removed. Only one process writes it at a time.

    Args:
        path: The file; made where it is missing.
        heading: What the entries depend on. One that was written with another heading is refused.

    Raises:
        DataError: It holds something else, or another heading.
        EnvironmentFaultError: Another process is writing it, or it cannot be written.
    """

    def __init__(self, path: Path, heading: Mapping[str, Any]) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise EnvironmentFaultError.at(
                str(path), f"cannot be written ({error.strerror})", "make it writable, or write elsewhere"
            ) from error
        try:
            _lock(self._file, path)
            self._cut_torn_line()
            self._hold_to(heading)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ResumeJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            os.fsync(self._file.fileno())
        self._file.close()

    def append(self, entry: Mapping[str, Any]) -> int:
        """Add an entry, which a crash of this process cannot lose any more; returns its place."""
        place = self._file.seek(0, os.SEEK_END)
        try:
            self._file.write(_line(entry))
            self._file.flush()
        except OSError as error:
            raise EnvironmentFaultError.at(
                str(self.path), f"cannot be written ({error.strerror})", "free some space and run it again: it goes on"
            ) from error
        return place

    def entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (place, entry) for all, in the order in which they were written. Raises ``DataError``."""
        return read_entries(self.path)

    def _cut_torn_line(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, size - 1))
        if size and self._file.read(1) != b"\n":
            self._file.seek(0)
            whole = 0
            for line in self._file:
                whole += len(line) if line.endswith(b"\n") else 0
            self._file.truncate(whole)

    def _hold_to(self, heading: Mapping[str, Any]) -> None:
        self._file.seek(0)
        first = self._file.readline()
        if not first:
            self._file.write(_line(heading))
            self._file.flush()
            return
        there = _decoded(first, f"{self.path}:1")
        expected = json.loads(_line(heading))
        if there != expected:
            differing = sorted(key for key in {*there, *expected} if there.get(key) != expected.get(key))
            changes = ", ".join(f"{key} was {there.get(key)!r} and is {expected.get(key)!r}" for key in differing)
            raise DataError.at(
                str(self.path), f"was written with other settings ({changes})", "remove it, or write elsewhere"
            )


def read_entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (place, entry) for all entries of a journal, also while it is being written. Raises ``DataError``."""
    with path.open("rb") as file:
        place = len(file.readline())
        for number, line in enumerate(file, 2):
            if line.endswith(b"\n"):
                yield place, _decoded(line, f"{path}:{number}")
            place += len(line)


def _line(value: Mapping[str, Any]) -> bytes:
    return (dump_json(value, separators=(",", ":")) + "\n").encode()


def _decoded(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError.at(where, f"is not JSON ({error})", "remove the file, and run it again") from error
    if not isinstance(value, dict):
        raise DataError.at(where, "is not an object", "remove the file, and run it again")
    return value


def _lock(file: IO[bytes], path: Path) -> None:
    with suppress(ImportError):  # Windows: two writers at once are the user's to avoid
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EnvironmentFaultError.at(str(path), "another process is writing it", "wait for it") from None
