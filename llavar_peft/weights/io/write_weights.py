"""Write many tensors from disk to disk at the same time, each in blocks; an interrupted run is resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
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
from llavar_peft.weights.io.tensor_table import TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

Blocks = Callable[[], Iterator["Tensor"]]
"""Returns the blocks of a tensor's rows, from first to last."""
Progress = Callable[[int, int], None]
"""Called after each tensor with the number of bytes written and the total."""

WORKERS = min(4, usable_cores())
"""Number of tensors that are written at the same time."""


def write_weights(
    writer: FolderWriter,
    blocks: Callable[[TensorSpec], Iterator[Tensor]],
    *,
    sources: Callable[[str], Sequence[TensorEntry | Tensor | None]],
    finish: Callable[[Path], None],
    progress: Progress | None,
) -> WeightsReport:
    """Write a folder of weights; no more than a few blocks are in memory.

    Args:
        writer: A new writer of the folder.
        blocks: Returns a tensor's rows from first to last.
        sources: Returns what a tensor is computed from, to find the cause of NaN and infinite elements.
        finish: Adds other files and checks the result, before the folder gets its name; if the result is wrong, nothing
            is kept.
        progress: Called after each tensor.

    Raises:
        WeightsError: A tensor is damaged, not finite, or exceeds the range of the dtype.
        InterruptedRunError: Ctrl-C; what was written is kept, and the same command resumes.
        EnvironmentFaultError: The disk is full.
    """

    def checked(spec: TensorSpec) -> Iterator[Tensor]:
        for block in blocks(spec):
            if count_not_finite(block):
                raise not_finite_error(spec.name, *sources(spec.name))
            yield block

    write_tensors(writer, {name: partial(checked, spec) for name, spec in writer.specs.items()}, progress)
    with _kept_if_possible(writer):
        with disk_errors(writer.out, needed=writer.total, only_full=True):
            finish(writer.finish())
        return writer.commit()


def identify_files(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return path, size and time of each file, for the plan of a writer."""
    files = sorted({path.resolve() for path in paths})
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def write_tensors(writer: FolderWriter, tensors: Mapping[str, Blocks], progress: Progress | None = None) -> None:
    """Write all tensors that are not written yet, several at the same time.

    Args:
        writer: Its plan has exactly these tensors.
        tensors: The blocks of each.
        progress: Called on this thread.

    Raises:
        InterruptedRunError: Ctrl-C; what was written is kept, and the same command resumes.
        LlavarError: As the blocks raise. For invalid input everything is deleted; after an error of the machine what
            was written is kept.
    """
    stop = Event()

    def write(name: str) -> str:
        def blocks() -> Iterator[Tensor]:
            for block in tensors[name]():
                if stop.is_set():
                    raise _StoppedError
                yield block

        writer.write(name, blocks())
        return name

    with _kept_if_possible(writer), ThreadPoolExecutor(WORKERS) as pool:
        try:
            _wait({pool.submit(write, name) for name in tensors if name not in writer.done}, writer, progress)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


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


def _wait(running: set[Future[str]], writer: FolderWriter, progress: Progress | None) -> None:
    written = sum(writer.size(name) for name in writer.done)
    while running:
        finished, running = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            written += writer.size(future.result())
        if progress is not None:
            progress(written, writer.total)


class _StoppedError(Exception):
    """Another tensor failed, or the user interrupted the run."""
