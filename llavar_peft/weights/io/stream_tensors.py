"""Many tensors from disk to disk at once, each in blocks; stoppable, and what is wrong decides what is left behind."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Event
from typing import TYPE_CHECKING

from llavar_peft.errors import EnvironmentFaultError, InterruptedRunError
from llavar_peft.weights.io.folder_writer import FolderWriter

if TYPE_CHECKING:
    from torch import Tensor

Blocks = Callable[[], Iterator["Tensor"]]
"""Starts a tensor's blocks of rows, from first to last."""
Progress = Callable[[int, int], None]
"""Told after each tensor how many bytes are written, and of how many."""

_WORKERS = min(4, os.cpu_count() or 1)


def stream(writer: FolderWriter, tensors: Mapping[str, Blocks], progress: Progress | None = None) -> None:
    """Write every tensor that is not there yet.

    Args:
        writer: Of a plan that has exactly these tensors.
        tensors: How each is made.
        progress: Called on this thread.

    Raises:
        InterruptedRunError: Ctrl-C; what was written is kept, and the same command goes on.
        LlavarError: As the blocks raise. Nothing is left behind of faulty input; after a fault of the machine what was
            written is kept.
    """
    stop = Event()

    def one(name: str) -> str:
        def watched() -> Iterator[Tensor]:
            for block in tensors[name]():
                if stop.is_set():
                    raise _StoppedError
                yield block

        writer.write(name, watched())
        return name

    try:
        with ThreadPoolExecutor(_WORKERS) as pool:
            try:
                _watch({pool.submit(one, name) for name in tensors if name not in writer.done}, writer, progress)
            except BaseException:
                stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    except KeyboardInterrupt:
        writer.pause()
        raise InterruptedRunError.at(
            str(writer.out), "stopped on request, and nothing is there yet", "run the same command again: it goes on"
        ) from None
    except EnvironmentFaultError:
        writer.pause()
        raise
    except BaseException:
        writer.discard()
        raise


def _watch(running: set[Future[str]], writer: FolderWriter, progress: Progress | None) -> None:
    written = sum(writer.size(name) for name in writer.done)
    while running:
        finished, running = wait(running, return_when=FIRST_COMPLETED)
        for future in finished:
            written += writer.size(future.result())
        if progress is not None:
            progress(written, writer.total)


class _StoppedError(Exception):
    """Another tensor failed, or the user stopped."""
