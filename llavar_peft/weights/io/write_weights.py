"""Write many tensors from disk to disk at the same time, each in blocks; an interrupted run is resumed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from llavar_peft.atomic_files import disk_errors
from llavar_peft.compat.usable_cores import usable_cores
from llavar_peft.errors import EnvironmentFaultError, InterruptedRunError
from llavar_peft.weights.io.folder_writer import FolderWriter, WeightsReport
from llavar_peft.weights.io.shard_layout import TensorSpec
from llavar_peft.weights.io.tensor_blocks import count_not_finite, not_finite_error
from llavar_peft.weights.io.tensor_stream import Blocks, TensorStream
from llavar_peft.weights.io.tensor_table import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[int, int], None]
"""Called after each tensor with the number of bytes written and the total."""

WORKERS = min(4, usable_cores())
"""Number of tensors that are written at the same time."""
_MOST_THREADS = 8
"""Threads of one operation on a block; more would wait for each other."""


@dataclass(frozen=True, slots=True)
class Along:
    """A computation with tensors while they are written.

    Attributes:
        names: Tensors that it writes, or reads before others may be written; all others are written before it starts.
        run: Writes and reads them. What it does not write is written after it.
    """

    names: Collection[str]
    run: Callable[[TensorStream], None]


def write_weights(
    writer: FolderWriter,
    blocks: Callable[[TensorSpec], Iterator[Tensor]],
    *,
    sources: Callable[[str], Sequence[TensorEntry | Tensor | None]],
    finish: Callable[[Path], None],
    progress: Progress | None,
    along: Along | None = None,
) -> WeightsReport:
    """Write a folder of weights; no more than a few blocks are in memory.

    Args:
        writer: A new writer of the folder.
        blocks: Returns a tensor's rows from first to last.
        sources: Returns what a tensor is computed from, to find the cause of NaN and infinite elements.
        finish: Adds other files and checks the result, before the folder gets its name; if the result is wrong, nothing
            is kept.
        progress: Called after each tensor.
        along: A computation with the tensors while they are written.

    Raises:
        WeightsError: A tensor is damaged, not finite, or exceeds the range of the dtype.
        InterruptedRunError: Ctrl-C; what was written is kept, and the same command resumes.
        EnvironmentFaultError: The disk is full.
    """

    def check(name: str, block: Tensor) -> None:
        if count_not_finite(block):
            raise not_finite_error(name, *sources(name))

    tensors = {name: partial(blocks, spec) for name, spec in writer.specs.items()}
    write_tensors(writer, tensors, progress, check=check, along=along)
    with _kept_if_possible(writer):
        with disk_errors(writer.out, needed=writer.total, only_full=True):
            finish(writer.finish())
        return writer.commit()


def identify_files(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return path, size and time of each file, for the plan of a writer."""
    files = sorted({path.resolve() for path in paths})
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def write_tensors(
    writer: FolderWriter,
    tensors: Mapping[str, Blocks],
    progress: Progress | None = None,
    *,
    check: Callable[[str, Tensor], None] | None = None,
    along: Along | None = None,
) -> None:
    """Write all tensors that are not written yet, several at the same time.

    Args:
        writer: Its plan has exactly these tensors.
        tensors: The blocks of each.
        progress: Called on this thread.
        check: Called with a tensor's name and its rows before they are written; raises if they are invalid. None
            accepts all.
        along: A computation with some of them, on this thread.

    Raises:
        InterruptedRunError: Ctrl-C; what was written is kept, and the same command resumes.
        LlavarError: As the blocks raise. For invalid input everything is deleted; after an error of the machine what
            was written is kept.
    """
    check = check or _accept
    written = set(writer.done)
    done = sum(map(writer.size, written))

    def report(name: str) -> None:
        nonlocal done
        written.add(name)
        done += writer.size(name)
        if progress is not None:
            progress(done, writer.total)

    with _kept_if_possible(writer):
        names = () if along is None else along.names
        _write_pooled(writer, {n: tensors[n] for n in tensors if n not in names and n not in written}, check, report)
        if along is not None:
            stream = TensorStream(writer, tensors, written=written, check=check, report=report)
            with _limited_threads(usable_cores() - 1):
                _run(along, stream)
            _write_pooled(writer, {n: tensors[n] for n in tensors if n not in written}, check, report)


def _accept(_name: str, _block: Tensor) -> None:
    pass


def _run(along: Along, stream: TensorStream) -> None:
    try:
        along.run(stream)
    except BaseException:
        stream.stop()
        raise
    stream.close()


def _write_pooled(
    writer: FolderWriter,
    tensors: Mapping[str, Blocks],
    check: Callable[[str, Tensor], None],
    report: Callable[[str], None],
) -> None:
    stop = Event()

    def write(name: str) -> str:
        def blocks() -> Iterator[Tensor]:
            for block in tensors[name]():
                if stop.is_set():
                    raise _StoppedError
                check(name, block)
                yield block

        writer.write(name, blocks())
        return name

    with _limited_threads(usable_cores() // WORKERS), ThreadPoolExecutor(WORKERS) as pool:
        try:
            for future in as_completed([pool.submit(write, name) for name in tensors]):
                report(future.result())
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextmanager
def _limited_threads(most: int) -> Iterator[None]:
    """Limit the threads of each of torch's operations: several threads compute, and those that wait use the cores."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, most, _MOST_THREADS)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _kept_if_possible(writer: FolderWriter) -> Iterator[None]:
    """Keep what is written if the machine or the user stopped the work, and delete it if the input is wrong."""
    try:
        yield
    except KeyboardInterrupt:
        writer.pause()
        raise InterruptedRunError.at(
            str(writer.out), "interrupted before it was complete", "run the same command again to resume"
        ) from None
    except (EnvironmentFaultError, OSError):
        writer.pause()
        raise
    except BaseException:
        writer.discard()
        raise


class _StoppedError(Exception):
    """Another tensor failed, or the user interrupted the run."""
