"""Journals of finished work, from which an interrupted run resumes without repeating any of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Final

from llavar_peft.atomic_files import disk_errors, dump_json, write_json
from llavar_peft.errors import DAMAGED, ConfigError, DataError, EnvironmentFaultError, describe_reason

if TYPE_CHECKING:
    from typing_extensions import Self

_MAX_CHANGES: Final = 6
_MAX_VALUE: Final = 80


class JournalSettingsError(ConfigError, DataError):
    """A journal was written by a run with other settings."""


class ResumeJournal:
    """An append-only file of JSON lines: a heading, then one entry per unit of work.

    Opening removes an incomplete last line that a killed run left, and locks the file against a second writer
    (not on Windows). Entries survive a crash of the process once ``append`` returns.

    Args:
        path: The file; created with its folder if missing.
        heading: The settings that the entries depend on. None for a file without a heading.

    Raises:
        JournalSettingsError: The file has another heading.
        DataError: The file does not contain a journal.
        EnvironmentFaultError: Another process has the file open, or it cannot be written.
    """

    def __init__(self, path: Path, heading: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self._has_heading = heading is not None
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        try:
            _lock(self._file, path)
            self._remove_incomplete_line()
            if heading is not None:
                self._check_heading(heading)
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(EnvironmentFaultError):
            self.sync()
        self._close()

    def _close(self) -> None:
        # On a full disk, closing tries again to write what could not be written, and fails again.
        with suppress(OSError):
            self._file.close()

    def append(self, *entries: Mapping[str, Any]) -> None:
        """Add entries. Raises ``EnvironmentFaultError`` if they cannot be written."""
        data = b"".join(map(_encode, entries))
        with disk_errors(self.path, needed=len(data)):
            self._file.write(data)
            self._file.flush()

    def sync(self) -> None:
        """Flush the file to the disk, so that its entries survive a crash of the machine too."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())

    def entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield ``(offset, entry)`` in the order of writing. Raises ``DataError`` for a malformed line."""
        return read_entries(self.path, has_heading=self._has_heading)

    def truncate(self, offset: int) -> None:
        """Remove the entry at an offset and all that follow it."""
        self._file.truncate(offset)

    def _remove_incomplete_line(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        self._file.seek(max(0, size - 1))
        if size and self._file.read(1) != b"\n":
            self._file.seek(0)
            self._file.truncate(sum(len(line) for line in self._file if line.endswith(b"\n")))

    def _check_heading(self, heading: Mapping[str, Any]) -> None:
        self._file.seek(0)
        first = self._file.readline()
        if first:
            check_settings(self.path, _decode(first, f"{self.path}:1"), heading)
        else:
            self.append(heading)


def read_entries(path: Path, *, has_heading: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield ``(offset, entry)`` for the complete lines of a journal, which another process may be writing.

    Raises:
        DataError: A line is not a JSON object.
    """
    with path.open("rb") as file:
        offset = len(file.readline()) if has_heading else 0
        for number, line in enumerate(file, 2 if has_heading else 1):
            if line.endswith(b"\n"):
                yield offset, _decode(line, f"{path}:{number}")
            offset += len(line)


def check_settings(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Check that a journal was written with the settings of this run; a missing setting equals None.

    Raises:
        JournalSettingsError: It was not; the message lists the settings that differ.
    """
    old, new = _flatten(found), _flatten(json.loads(dump_json(expected)))
    changed = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if changed:
        listed = [
            f"{key} was {repr(old.get(key))[:_MAX_VALUE]} and is {repr(new.get(key))[:_MAX_VALUE]}"
            for key in changed[:_MAX_CHANGES]
        ]
        listed += [f"and {len(changed) - _MAX_CHANGES} more"] if len(changed) > _MAX_CHANGES else []
        raise JournalSettingsError.at(
            str(path),
            f"was written by a run with other settings ({', '.join(listed)})",
            "repeat that run's settings to resume it, or delete the file, or choose another output path",
        )


class ReplyFolder:
    """A folder of replies by key, one JSON file each, which several runs may share and write at the same time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, key: str) -> Any:
        """Return the value of a key, None if there is none or its file is damaged."""
        try:
            return json.loads((self._folder / f"{key}.json").read_text(encoding="utf-8"))
        except DAMAGED:
            return None

    def write(self, key: str, value: Mapping[str, Any]) -> None:
        """Write the value of a key."""
        write_json(self._folder / f"{key}.json", value)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _encode(value: Mapping[str, Any]) -> bytes:
    return (dump_json(value, separators=(",", ":")) + "\n").encode()


def _decode(line: bytes, location: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except DAMAGED as error:
        raise DataError.at(
            location, f"is not JSON ({describe_reason(error)})", "delete the file, and run again"
        ) from error
    if not isinstance(value, dict):
        raise DataError.at(location, "is not a JSON object", "delete the file, and run again")
    return value


def _lock(file: IO[bytes], path: Path) -> None:
    with suppress(ImportError):  # Windows has no fcntl
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentFaultError.at(
                str(path), "another process is writing it", "wait until that process has finished"
            ) from None
