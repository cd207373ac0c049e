"""The one thread that computes: answers join and leave its batches at any step."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby

from llavar_peft.inference.batch_decoder import DecodingBatch, Row
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.generation_request import Answer, Request

logger = logging.getLogger(__name__)

Event = str | Answer | Exception
"""A piece of text; at last the answer, or why there is none."""


class BusyError(Exception):
    """The queue is full."""


class Job:
    """An answer that is wanted.

    Args:
        request: What is wanted.
        engine: Who answers.
        listen: Called from the computing thread with each event; the last is an ``Answer`` or an exception.

    Raises:
        DataError: The prompt does not fit into the model's context.
    """

    def __init__(self, request: Request, engine: Engine, listen: Callable[[Event], None]) -> None:
        self.row = Row(request, engine, listen)
        self.listen = listen

    def cancel(self) -> None:
        """Nobody wants it any more. From any thread, at any time."""
        self.row.cancelled = True


class Scheduler:
    """Answers from any number of threads, computed in one.

    Args:
        engine: Who answers; nobody else may use it meanwhile.
        rows: Answers at most that are computed at a time.
        waiting: Answers at most that wait.
    """

    def __init__(self, engine: Engine, *, rows: int, waiting: int) -> None:
        self.engine = engine
        self._most_rows = rows
        self._most_waiting = waiting
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[str | None, list[Job]] = {}
        self._batches: dict[str | None, DecodingBatch] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="llavar-decoding", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Answer that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answer that are being computed."""
        return sum(len(jobs) for jobs in list(self._running.values()))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put answers into the queue, all or none.

        Args:
            jobs: The answers to one request.

        Raises:
            BusyError: The queue is full, or the service closed.
        """
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not job.row.cancelled)
            if self._closed or len(self._waiting) + len(jobs) > self._most_waiting:
                raise BusyError
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """End what is being computed, answers what waits with an error, and stops the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._closed):
                    self._changed.wait()
                if self._closed:
                    break
                taken = self._next()
            for adapter, group in groupby(taken, key=lambda job: job.row.request.adapter):
                self._join(adapter, list(group))
            for adapter in list(self._running):
                self._guarded(adapter, lambda batch: batch.step())
        for job in [*self._waiting, *(job for jobs in self._running.values() for job in jobs)]:
            job.listen(BusyError())
        self._waiting.clear()
        self._running.clear()

    def _next(self) -> list[Job]:
        """As many as there is room for, in the order they came; neighbours of one adapter start together."""
        taken: list[Job] = []
        room = self._most_rows - self.running
        while self._waiting and len(taken) < room:
            job = self._waiting.popleft()
            if not job.row.cancelled:
                taken.append(job)
        return taken

    def _join(self, adapter: str | None, jobs: list[Job]) -> None:
        self._running.setdefault(adapter, []).extend(jobs)
        self._guarded(adapter, lambda batch: batch.join([job.row for job in jobs]))

    def _guarded(self, adapter: str | None, act: Callable[[DecodingBatch], None]) -> None:
        """Acts on a batch and hands out what ended with it; if it breaks, its answers do, and no others."""
        jobs = self._running[adapter]
        try:
            if adapter not in self._batches:
                self._batches[adapter] = DecodingBatch(self.engine, adapter)
            act(self._batches[adapter])
        except Exception as error:
            logger.exception("a batch of %d answers broke", len(jobs))
            for job in jobs:
                job.listen(error)
            del self._running[adapter]
            self._batches.pop(adapter, None)
            return
        for job in jobs:
            if job.row.answer is not None:
                job.listen(job.row.answer)
        left = [job for job in jobs if job.row.answer is None]
        if left:
            self._running[adapter] = left
        else:
            del self._running[adapter], self._batches[adapter]
