"""Continuous batching: one thread decodes, and answers join and leave its batches at any step."""

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
"""A piece of text, the complete answer, or the exception that ended it."""


class BusyError(Exception):
    """The queue is full, or the scheduler is closed."""


class Job:
    """An answer to compute.

    Args:
        request: The prompt and the sampling settings.
        engine: The model.
        listen: Called from the decoding thread with each event; the last is an ``Answer`` or an exception.

    Raises:
        DataError: The prompt does not fit into the model's context.
    """

    def __init__(self, request: Request, engine: Engine, listen: Callable[[Event], None]) -> None:
        self.row = Row(request, engine, listen)
        self.listen = listen

    def cancel(self) -> None:
        """Cancel the answer. Safe to call from any thread at any time."""
        self.row.cancelled = True


class Scheduler:
    """Accepts jobs from any thread and computes them in one.

    Args:
        engine: The model; nothing else may use it until the scheduler is closed.
        rows: Largest number of answers computed at the same time.
        waiting: Largest number of answers in the queue.
    """

    def __init__(self, engine: Engine, *, rows: int, waiting: int) -> None:
        self.engine = engine
        self._max_rows = rows
        self._max_waiting = waiting
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[str | None, list[Job]] = {}
        self._batches: dict[str | None, DecodingBatch] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="llavar-decoding", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of answers in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of answers that are being computed."""
        return sum(len(jobs) for jobs in list(self._running.values()))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put all jobs of a request into the queue, or none.

        Raises:
            BusyError: The queue is full, or the scheduler is closed.
        """
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not job.row.cancelled)
            if self._closed or len(self._waiting) + len(jobs) > self._max_waiting:
                raise BusyError
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """Stop the thread; all jobs that are not complete get a ``BusyError``."""
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
                jobs = self._take_waiting()
            for adapter, group in groupby(jobs, key=lambda job: job.row.request.adapter):
                self._join(adapter, list(group))
            for adapter in list(self._running):
                self._run_batch(adapter, lambda batch: batch.step())
        for job in [*self._waiting, *(job for jobs in self._running.values() for job in jobs)]:
            job.listen(BusyError())
        self._waiting.clear()
        self._running.clear()

    def _take_waiting(self) -> list[Job]:
        """Take as many jobs as there is room for, in order; adjacent jobs of one adapter start together."""
        taken: list[Job] = []
        room = self._max_rows - self.running
        while self._waiting and len(taken) < room:
            job = self._waiting.popleft()
            if not job.row.cancelled:
                taken.append(job)
        return taken

    def _join(self, adapter: str | None, jobs: list[Job]) -> None:
        self._running.setdefault(adapter, []).extend(jobs)
        self._run_batch(adapter, lambda batch: batch.join([job.row for job in jobs]))

    def _run_batch(self, adapter: str | None, action: Callable[[DecodingBatch], None]) -> None:
        """Apply an action to a batch and deliver complete answers; an exception ends the answers of this batch only."""
        jobs = self._running[adapter]
        try:
            if adapter not in self._batches:
                self._batches[adapter] = DecodingBatch(self.engine, adapter)
            action(self._batches[adapter])
        except Exception as error:
            logger.exception("a batch of %d answers failed", len(jobs))
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
