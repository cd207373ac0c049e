"""Writes a folder of weights tensor by tensor, in any order, from several threads, and goes on after a kill."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from llavar_peft.atomic_files import commit_folder, write_text
from llavar_peft.errors import ConfigError, EnvironmentFaultError, WeightsError
from llavar_peft.weights.io.shard_layout import (
    TensorSpec,
    WeightsFormat,
    allocate_shards,
    finish_shards,
    index_of,
    plan_shards,
    tensor_offsets,
)
from llavar_peft.weights.io.tensor_blocks import tensor_bytes
from llavar_peft.weights.io.tensor_table import CHECKSUMS_FILE, TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

_JOURNAL = ".journal"
_SYNC_AFTER = 1 << 29
"""Bytes written before they are synced and entered in the journal: what a crash can cost."""


@dataclass(frozen=True, slots=True)
class WeightsReport:
    """What was written.

    Attributes:
        out: The folder.
        tensors: How many.
        nbytes: Bytes of their numbers.
        seconds: How long it took.
    """

    out: Path
    tensors: int
    nbytes: int
    seconds: float


class FolderWriter:
    """A folder of weights in the making, beside its final place under a hidden name.

    A tensor counts as written when its line is in the journal, and the line is written after the tensor's bytes were
    synced. A writer of the same plan goes on from there; one of another plan starts anew.

    Args:
        out: The folder that is to appear.
        specs: All tensors, in the order of the files.
        form: Of the files.
        shard_size: Bytes of a file at most.
        plan: What the tensors are made from; with other inputs nothing of an earlier attempt is used.

    Raises:
        ConfigError: The folder exists.
        EnvironmentFaultError: Another process is at work on the same folder, or it cannot be written to.
    """

    def __init__(
        self, out: Path, specs: Sequence[TensorSpec], *, form: WeightsFormat, shard_size: int, plan: str
    ) -> None:
        if out.exists():
            raise ConfigError.at(str(out), "exists already", "remove it, or give another folder")
        self._started = time.perf_counter()
        self.out, self.staged = out, out.with_name(f".{out.name}.part")
        self._form, self._shards = form, plan_shards(specs, form, shard_size)
        self._specs = {spec.name: spec for spec in specs}
        self._key = hashlib.sha256(repr((plan, form, self._shards)).encode()).hexdigest()
        self._lock = threading.Lock()
        self._unsynced: dict[str, int] = {}
        self._checksums: dict[str, int] = {}
        self._entries: dict[str, TensorEntry] = {}
        with _disk_errors(self.staged):
            self._journal = self._open()

    @property
    def done(self) -> frozenset[str]:
        """Tensors that need not be written again."""
        return frozenset(self._checksums)

    @property
    def total(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self._specs.values())

    def size(self, name: str) -> int:
        """Bytes of a tensor."""
        return self._specs[name].nbytes

    def write(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Write one tensor. May be called from several threads, for different tensors.

        Args:
            name: One of the specs'.
            blocks: Its rows from first to last, of the spec's dtype.

        Raises:
            WeightsError: The blocks are more or fewer than the spec says.
            EnvironmentFaultError: The disk is full or fails.
        """
        entry, checksum, done = self._entries[name], 0, 0
        with entry.path.open("r+b", buffering=0) as file:
            file.seek(entry.offset)
            for block in blocks:
                view = tensor_bytes(block)
                done += len(view)
                if done > entry.nbytes or str(block.dtype) != f"torch.{entry.dtype}":
                    raise WeightsError.at(f"{self.out}:{name}", "more than fits", "report this")
                checksum = zlib.crc32(view, checksum)
                with _disk_errors(self.staged):
                    _write_all(file, view)
        if done != entry.nbytes:
            raise WeightsError.at(f"{self.out}:{name}", f"{done} of {entry.nbytes} bytes came", "report this")
        with self._lock:
            self._unsynced[name] = checksum
            if sum(self._specs[waiting].nbytes for waiting in self._unsynced) >= _SYNC_AFTER:
                self._sync()

    def pause(self) -> None:
        """Keep what is written for another time."""
        with self._lock, _disk_errors(self.staged):
            self._sync()
            self._journal.close()

    def discard(self) -> None:
        """Leaves nothing behind."""
        with self._lock:
            self._journal.close()
            shutil.rmtree(self.staged, ignore_errors=True)

    def finish(self) -> Path:
        """Completes the files of weights.

        Returns:
            The hidden folder, for what else is to go into it before ``settle``.

        Raises:
            WeightsError: A tensor was not written.
        """
        with self._lock, _disk_errors(self.staged):
            self._sync()
            missing = [name for name in self._specs if name not in self._checksums]
            if missing:
                raise WeightsError.at(str(self.out), f"not written: {', '.join(missing[:8])}", "report this")
            for file, shard in self._shards.items():
                finish_shards(self.staged / file, {spec.name: self._checksums[spec.name] for spec in shard})
            index = index_of(self._shards, self._form)
            if index is not None:
                write_text(self.staged / index[0], index[1])
            if self._form == "safetensors":
                write_text(self.staged / CHECKSUMS_FILE, json.dumps(self._checksums, indent=0) + "\n")
        return self.staged

    def settle(self) -> WeightsReport:
        """Let the folder appear under its name.

        Returns:
            What was written.
        """
        with _disk_errors(self.staged):
            self._journal.close()
            (self.staged / _JOURNAL).unlink()
            commit_folder(self.staged, self.out)
        return WeightsReport(self.out, len(self._specs), self.total, time.perf_counter() - self._started)

    def _open(self) -> IO[str]:
        journal = self.staged / _JOURNAL
        if journal.is_file():
            opened = _locked(journal, self.staged)
            lines = [line for line in journal.read_text(encoding="utf-8").split("\n")[:-1] if line]
            if lines and lines[0] == self._key:
                self._checksums = {name: crc for name, crc in map(json.loads, lines[1:]) if name in self._specs}
                self._find_places()
                # A line that the kill cut off would spoil the next one.
                opened.truncate(len(("\n".join(lines) + "\n").encode()))
                opened.seek(0, os.SEEK_END)
                return opened
            opened.close()
        shutil.rmtree(self.staged, ignore_errors=True)
        self.staged.mkdir(parents=True)
        opened = _locked(journal, self.staged)
        for file, shard in self._shards.items():
            allocate_shards(self.staged / file, shard)
        self._find_places()
        opened.write(self._key + "\n")
        opened.flush()
        os.fsync(opened.fileno())
        return opened

    def _find_places(self) -> None:
        for file in self._shards:
            self._entries.update(tensor_offsets(self.staged / file))

    def _sync(self) -> None:
        for path in {self._entries[name].path for name in self._unsynced}:
            with path.open("rb") as file:
                os.fsync(file.fileno())
        lines = [json.dumps([name, checksum]) + "\n" for name, checksum in self._unsynced.items()]
        self._journal.write("".join(lines))
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._checksums.update(self._unsynced)
        self._unsynced.clear()


def _write_all(file: IO[bytes], view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += file.write(view[done:])


def _locked(journal: Path, staged: Path) -> IO[str]:
    opened = journal.open("a+", encoding="utf-8")
    with suppress(ImportError):  # Windows: two writers at once are the user's to avoid
        import fcntl

        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            opened.close()
            raise EnvironmentFaultError.at(str(staged), "another process is writing it", "wait for it") from None
    return opened


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turn an ``OSError`` of writing into ours."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some space and run the same command again: it goes on" if full else "make it writable"
        raise EnvironmentFaultError.at(str(folder), str(error.strerror or error), fix) from error
