"""Write a folder of weights tensor by tensor, from several threads; a run that was killed is resumed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

from llavar_peft.atomic_files import check_output_folder, commit_folder, disk_errors, hold_lock, write_text
from llavar_peft.errors import ConfigError, WeightsError
from llavar_peft.types import ReadableRepr
from llavar_peft.weights.io.shard_layout import (
    TensorSpec,
    WeightsFormat,
    allocate_file,
    build_index,
    plan_shards,
    write_zip_checksums,
)
from llavar_peft.weights.io.tensor_blocks import tensor_bytes
from llavar_peft.weights.io.tensor_table import (
    CHECKSUMS_FILE,
    TensorEntry,
    dtype_name,
    read_file_table,
    read_tensor_table,
)

if TYPE_CHECKING:
    from torch import Tensor

_JOURNAL, _RESERVE = ".journal", ".reserve"
_ENTRY_BYTES = 32
"""Size of an entry of the journal without the tensor's name, which the reserve keeps free for it."""
_SYNC_AFTER = 1 << 29
"""Number of bytes written before they are synced and entered in the journal: what a crash can lose."""
_SAMPLE = 4096
"""Bytes at the start and at the end of each tensor that are read again when all files are complete."""
_REPORT = "report this as a bug"


@dataclass(frozen=True, slots=True, repr=False)
class WeightsReport(ReadableRepr):
    """What was written.

    Attributes:
        out: The folder.
        tensors: Number of tensors.
        nbytes: Size of the tensors in bytes.
        seconds: Duration.
    """

    out: Path
    tensors: int
    nbytes: int
    seconds: float


class FolderWriter:
    """A folder of weights that is written under a hidden name and renamed at the end.

    A tensor counts as written once it is in the journal, which happens after its bytes were synced. A writer with the
    same plan resumes there; one with another plan starts from the beginning.

    Args:
        out: The folder to create.
        specs: All tensors, in the order of the files.
        form: Format of the files.
        shard_size: Maximum size of a file in bytes.
        plan: Identifies the inputs; an earlier attempt with other inputs is discarded.

    Raises:
        ConfigError: The folder exists, or its path leads through a file or a link to nothing.
        EnvironmentFaultError: Another process is writing the same folder, it is not writable, or the disk is full.
    """

    def __init__(
        self, out: Path, specs: Sequence[TensorSpec], *, form: WeightsFormat, shard_size: int, plan: str
    ) -> None:
        self._started = time.perf_counter()
        check_is_new(out)
        self.out, self.staged = out, out.with_name(f".{out.name}.part")
        self._form, self._shards = form, plan_shards(specs, form, shard_size)
        self.specs = {spec.name: spec for spec in specs}
        self.total = sum(spec.nbytes for spec in specs)
        """Size of all tensors in bytes."""
        self._key = hashlib.sha256(repr((plan, form, self._shards)).encode()).hexdigest()
        self._lock = threading.Lock()
        self._unsynced: dict[str, int] = {}
        self._unsynced_bytes = 0
        self._checksums: dict[str, int] = {}
        self._entries: dict[str, TensorEntry] = {}
        self._ends: dict[str, tuple[bytes, bytes]] = {}
        check_output_folder(out, str(out))
        with ExitStack() as held:
            held.enter_context(hold_lock(out.with_name(f".{out.name}.lock"), where=out))
            check_is_new(out)  # another process may have finished it before this one got the lock
            try:
                with disk_errors(out, needed=self.total):
                    self._journal = self._open()
            except BaseException:
                self._remove_if_empty()
                raise
            self._held = held.pop_all()

    @property
    def done(self) -> frozenset[str]:
        """Tensors that need not be written again."""
        return frozenset(self._checksums)

    def size(self, name: str) -> int:
        """Return the size of a tensor in bytes."""
        return self.specs[name].nbytes

    def stored(self, name: str) -> TensorEntry:
        """Return where a tensor that is written is on disk, with its checksum."""
        with self._lock:
            checksum = self._unsynced.get(name, self._checksums.get(name))
        return replace(self._entries[name], crc32=checksum)

    def write(self, name: str, blocks: Iterable[Tensor]) -> None:
        """Write one tensor. Several threads may write different tensors.

        Args:
            name: Name of one of the specs.
            blocks: Its rows from first to last, in the dtype of the spec.

        Raises:
            WeightsError: The blocks do not have the size or the dtype of the spec.
            EnvironmentFaultError: The disk is full or fails.
        """
        entry, checksum, done, start, end = self._entries[name], 0, 0, b"", b""
        with entry.path.open("r+b", buffering=0) as file:
            file.seek(entry.offset)
            for block in blocks:
                view = tensor_bytes(block)
                done += len(view)
                if done > entry.nbytes or dtype_name(block) != entry.dtype:
                    what = f"a block does not fit (got {dtype_name(block)}, {done} bytes, expected {entry.dtype}, "
                    raise WeightsError.at(f"{self.out}:{name}", f"{what}{entry.nbytes} bytes)", _REPORT)
                checksum = zlib.crc32(view, checksum)
                start, end = start or bytes(view[:_SAMPLE]), bytes(view[-_SAMPLE:])
                with disk_errors(self.out, needed=self.total):
                    _write_all(file, view)
        if done != entry.nbytes:
            what = f"incomplete tensor (got {done} bytes, expected {entry.nbytes})"
            raise WeightsError.at(f"{self.out}:{name}", what, _REPORT)
        with self._lock, disk_errors(self.out, needed=self.total):
            self._unsynced[name], self._ends[name] = checksum, (start, end)
            self._unsynced_bytes += done
            if self._unsynced_bytes >= _SYNC_AFTER:
                self._sync()

    def pause(self) -> None:
        """Keep what is written, so that a later writer can resume; tensors that cannot be synced are written again."""
        with self._lock, self._held:
            with suppress(OSError):
                (self.staged / _RESERVE).unlink()  # on a full disk, this makes room for the journal
            with suppress(OSError, ValueError):  # the disk may be full, or the journal closed already
                self._sync()
            with suppress(OSError):
                self._journal.close()
            self._remove_if_empty()

    def discard(self) -> None:
        """Delete everything that was written."""
        with self._lock, self._held:
            with suppress(OSError):
                self._journal.close()
            shutil.rmtree(self.staged, ignore_errors=True)

    def finish(self) -> Path:
        """Complete the files of weights.

        Returns:
            The hidden folder, to which other files may be added before ``commit``.

        Raises:
            WeightsError: A tensor was not written.
        """
        with self._lock, disk_errors(self.out, needed=self.total):
            self._sync()
            missing = [name for name in self.specs if name not in self._checksums]
            if missing:
                raise WeightsError.at(str(self.out), f"tensors not written: {', '.join(missing[:8])}", _REPORT)
            for file, shard in self._shards.items():
                write_zip_checksums(self.staged / file, {spec.name: self._checksums[spec.name] for spec in shard})
            index = build_index(self._shards, self._form)
            if index is not None:
                write_text(self.staged / index[0], index[1])
            if self._form == "safetensors":
                # In the order of the plan, so that equal runs write equal files.
                sums = {name: self._checksums[name] for name in self.specs}
                write_text(self.staged / CHECKSUMS_FILE, json.dumps(sums, indent=0) + "\n")
            self._check_ends()
        return self.staged

    def commit(self) -> WeightsReport:
        """Rename the folder to its final name."""
        with self._held, disk_errors(self.out, needed=self.total):
            check_is_new(self.out)  # where files cannot be locked
            self._journal.close()
            (self.staged / _RESERVE).unlink(missing_ok=True)
            commit_folder(self.staged, self.out, journal=self.staged / _JOURNAL)
        return WeightsReport(self.out, len(self.specs), self.total, time.perf_counter() - self._started)

    def _check_ends(self) -> None:
        """Open the finished folder as its users do, and compare the ends of each tensor with what was written."""
        table = read_tensor_table(self.staged, checksums=False)
        for name, (start, end) in self._ends.items():
            entry = table.get(name)
            if entry is None or (entry.shape, entry.dtype) != (self.specs[name].shape, self.specs[name].dtype):
                raise WeightsError.at(f"{self.out}:{name}", "not in the files as it was written", _REPORT)
            with entry.path.open("rb", buffering=0) as file:
                for at, expected in ((0, start), (entry.nbytes - len(end), end)):
                    file.seek(entry.offset + at)
                    if entry.data is None and file.read(len(expected)) != expected:
                        what = "the file does not contain what was written"
                        raise WeightsError.at(entry.location, what, "check the disk, and run the command again")

    def _open(self) -> IO[str]:
        journal = self.staged / _JOURNAL
        if journal.is_file():
            opened = journal.open("a+", encoding="utf-8")
            lines = [line for line in journal.read_text(encoding="utf-8").split("\n")[:-1] if line]
            if lines and lines[0] == self._key:
                self._checksums = {name: crc for name, crc in map(json.loads, lines[1:]) if name in self.specs}
                self._find_entries()
                # A line that was cut off by a kill would damage the next one.
                opened.truncate(len(("\n".join(lines) + "\n").encode()))
                opened.seek(0, os.SEEK_END)
                self._reserve()
                return opened
            opened.close()
        shutil.rmtree(self.staged, ignore_errors=True)
        self.staged.mkdir(parents=True)
        opened = journal.open("a+", encoding="utf-8")
        for file, shard in self._shards.items():
            allocate_file(self.staged / file, shard)
        self._find_entries()
        self._reserve()
        opened.write(self._key + "\n")
        opened.flush()
        os.fsync(opened.fileno())
        return opened

    def _reserve(self) -> None:
        """Occupy the space that the journal will need, so that work can be kept when the disk is full."""
        (self.staged / _RESERVE).write_bytes(bytes(sum(len(name) + _ENTRY_BYTES for name in self.specs)))

    def _remove_if_empty(self) -> None:
        """Remove the hidden folder if it holds nothing to resume."""
        if not self._checksums:
            shutil.rmtree(self.staged, ignore_errors=True)

    def _find_entries(self) -> None:
        for file in self._shards:
            self._entries.update(read_file_table(self.staged / file))

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
        self._unsynced_bytes = 0


def _write_all(file: IO[bytes], view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += file.write(view[done:])


def check_is_new(out: Path) -> None:
    """Reject an output folder that exists.

    Raises:
        ConfigError: Names the folder.
    """
    if out.exists():
        raise ConfigError.at(str(out), "exists already", "delete it, or give another folder")


def check_outside(out: Path, *sources: Path) -> None:
    """Reject an output inside a folder that it is made from, which stays as it is.

    Raises:
        ConfigError: Names the two folders.
    """
    target = Path(os.path.realpath(out))
    for source in sources:
        if Path(os.path.realpath(source)) in target.parents:
            what = f"is in the folder that it is made from, {source}, which stays as it is"
            raise ConfigError.at(str(out), what, "choose a folder outside it")
