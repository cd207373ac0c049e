"""Continuous batching: one thread decodes, and answers join and leave its batches at any step."""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
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
        listen: Called from any thread with each event; the last is an ``Answer`` or an exception.
        client: The client that asked; running answers are shared among clients.

    Raises:
        DataError: The prompt does not fit into the model's context.
    """

    def __init__(self, request: Request, engine: Engine, listen: Callable[[Event], None], client: str = "") -> None:
        self.client = client
        self.row = Row(request, engine, listen)
        self.listen = listen

    def cancel(self) -> None:
        """Cancel the answer. Safe to call from any thread at any time."""
        self.row.cancelled = True


class Scheduler:
    """Accepts jobs from any thread and computes them in one.

    Clients take turns: when there is room, the client with the fewest running answers is next, and of several that
    whose last turn is longest ago. A client that has
    nothing in the queue may use a quarter more of it than the others, so that one client cannot keep all others out.

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
        self._turns: dict[str, int] = {}
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

    @property
    def closed(self) -> bool:
        """Whether the scheduler takes no more jobs."""
        return self._closed

    def is_full(self, client: str) -> bool:
        """Return whether the queue has no room for one more answer to a client."""
        return len(self._waiting) >= self._room_of(client)

    def _room_of(self, client: str) -> int:
        is_new = all(job.client != client for job in list(self._waiting))
        return self._max_waiting + (self._max_waiting // 4 if is_new else 0)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put all jobs of a request into the queue, or none.

        Raises:
            BusyError: The queue is full, or the scheduler is closed.
        """
        with self._changed:
            self._waiting = deque(job for job in self._waiting if not job.row.cancelled)
            room = max((self._room_of(job.client) for job in jobs), default=0)
            if self._closed or len(self._waiting) + len(jobs) > room:
                raise BusyError
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """Stop the thread; all jobs that are not complete get a ``BusyError`` at once, before the last step ends."""
        with self._changed:
            self._closed = True
            self._changed.notify()
            self._end_all()
        self._thread.join()

    def _end_all(self) -> None:
        for job in [*self._waiting, *(job for jobs in list(self._running.values()) for job in jobs)]:
            job.listen(BusyError())

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
        self._end_all()
        self._waiting.clear()
        self._running.clear()

    def _take_waiting(self) -> list[Job]:
        """Take as many jobs as there is room for; adjacent jobs of one adapter start together."""
        self._waiting = deque(job for job in self._waiting if not job.row.cancelled)
        running = Counter(job.client for jobs in self._running.values() for job in jobs)
        taken: list[Job] = []
        room = self._max_rows - self.running
        while self._waiting and len(taken) < room:
            # The first of several in the queue.
            job = min(self._waiting, key=lambda one: (running[one.client], self._turns.get(one.client, 0)))
            self._waiting.remove(job)
            running[job.client] += 1
            self._turns[job.client] = max(self._turns.values(), default=0) + 1
            taken.append(job)
        present = {*running, *(job.client for job in self._waiting)}
        self._turns = {client: turn for client, turn in self._turns.items() if client in present}
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
            del self._running[adapter]
            self._batches.pop(adapter, None)
            for job in jobs:
                job.listen(error)
            return
        left = [job for job in jobs if job.row.answer is None]
        if left:
            self._running[adapter] = left
        else:
            del self._running[adapter], self._batches[adapter]
        for job in jobs:  # after they have left, so that their clients find room
            if job.row.answer is not None:
                job.listen(job.row.answer)
