"""Tensors that are written while a computation uses their rows, in an order that the computation chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import Empty, Full, Queue
from threading import Event
from typing import TYPE_CHECKING, TypeAlias

from llavar_peft.weights.io.folder_writer import FolderWriter
from llavar_peft.weights.io.tensor_blocks import read_blocks

if TYPE_CHECKING:
    from torch import Tensor

_AHEAD = 2
"""Number of blocks that wait to be written."""
_POLL = 0.2
"""Seconds until a thread that waits looks whether the other one has ended."""

Put: TypeAlias = "Callable[[Tensor], Tensor]"
"""Takes the next rows of a tensor, and returns these rows as they are in the file, in its dtype."""
Blocks: TypeAlias = "Callable[[], Iterator[Tensor]]"
"""Returns the blocks of a tensor's rows, from first to last."""


class TensorStream:
    """Writes the tensors of a folder one after another, in any order, and reads those that are written.

    The rows are written on other threads, while the next ones are computed.

    Args:
        writer: The writer of the folder.
        tensors: The blocks of each tensor, to write those whose rows are not given.
        check: Called with a tensor's name and its rows before they are written; raises if they are invalid.
        report: Called with the name of each tensor that is written.
    """

    def __init__(
        self,
        writer: FolderWriter,
        tensors: Mapping[str, Blocks],
        *,
        written: set[str],
        check: Callable[[str, Tensor], None],
        report: Callable[[str], None],
    ) -> None:
        self._writer, self._tensors, self._check, self._report = writer, tensors, check, report
        self._written = written
        self._jobs: dict[str, Future[None]] = {}
        self._pool = ThreadPoolExecutor(2)  # one may wait for a sync

    def is_written(self, name: str) -> bool:
        """Return whether all rows of a tensor were given."""
        return name in self._written

    @contextmanager
    def writing(self, name: str) -> Iterator[Put]:
        """Write a tensor, whose rows are given from first to last.

        The rows must not be modified afterwards. If the tensor was written before, for example before an interruption,
        they are not used: what is in the file is read again.

        Raises:
            WeightsError: Rows are invalid, or the file has been damaged since the tensor was written.
            EnvironmentFaultError: The disk is full or fails.
        """
        if name in self._written:
            stored = self.blocks(name)
            yield _StoredRows(stored)
            for _ in stored:  # the checksum is compared after the last block
                pass
            return
        rows: Queue[Tensor | None] = Queue(_AHEAD)
        broken = Event()
        job = self._jobs[name] = self._pool.submit(self._writer.write, name, _until_none(rows, broken))

        def put(block: Tensor) -> Tensor:
            self._check(name, block)
            _put(rows, block, job)
            return block

        try:
            yield put
            _put(rows, None, job)
        except BaseException:
            broken.set()
            raise
        self._written.add(name)
        self._report(name)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Read the blocks of a tensor from the file that is being written; it is written first if it is not yet.

        Raises:
            WeightsError: As for ``writing``.
        """
        if name not in self._written:
            with self.writing(name) as put:
                for block in self._tensors[name]():
                    put(block)
        if name in self._jobs:
            self._jobs[name].result()
        return read_blocks(self._writer.stored(name))

    def close(self) -> None:
        """Wait until everything that was given is written, and raise the error if that failed."""
        for job in self._jobs.values():
            job.result()
        self._pool.shutdown()

    def stop(self) -> None:
        """Wait for the threads after an error."""
        self._pool.shutdown(cancel_futures=True)


class _StoredRows:
    """Returns the rows of a file instead of those that it is called with, as many as those."""

    def __init__(self, blocks: Iterator[Tensor]) -> None:
        self._blocks = blocks
        self._rest: Tensor | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        import torch

        count = len(rows)
        while self._rest is None or len(self._rest) < count:
            block = next(self._blocks)
            self._rest = block if self._rest is None else torch.cat([self._rest, block])
        found, self._rest = self._rest[:count], self._rest[count:]
        return found


def _put(rows: Queue[Tensor | None], block: Tensor | None, job: Future[None]) -> None:
    """Give rows to the writing thread, or raise the error that ended it."""
    while True:
        if job.done():
            job.result()
        try:
            rows.put(block, timeout=_POLL)
        except Full:
            continue
        return


def _until_none(rows: Queue[Tensor | None], broken: Event) -> Iterator[Tensor]:
    while not broken.is_set():
        try:
            block = rows.get(timeout=_POLL)
        except Empty:
            continue
        if block is None:
            return
        yield block
    raise _BrokenOffError


class _BrokenOffError(Exception):
    """The computation of a tensor's rows failed; the error is raised there."""
