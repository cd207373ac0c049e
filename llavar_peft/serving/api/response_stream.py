"""The answers to one request, as they come from the computing thread into the server's loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from fastapi import Request as HttpRequest

from llavar_peft.errors import LlavarError
from llavar_peft.inference.generation_request import Answer, Request
from llavar_peft.serving.api.request_limits import RequestRefusedError
from llavar_peft.serving.api.scheduler import BusyError, Event, Job, Scheduler


class ResponseStream:
    """Waits for a request's answers. Whoever leaves before the end cancels them.

    Args:
        service: Who computes.
        expected: The answers.
        deadline: By ``time.monotonic``.
        retry_after: What to tell clients that are sent away.

    Raises:
        RequestRefusedError: The queue is full, or the prompt does not fit.
    """

    def __init__(self, service: Scheduler, expected: Sequence[Request], *, deadline: float, retry_after: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._deadline = deadline
        try:
            self.jobs = [self._job(number, one, service) for number, one in enumerate(expected)]
        except LlavarError:
            raise RequestRefusedError(
                400, "the messages are longer than the model's context", "context_length_exceeded"
            ) from None
        try:
            service.submit(self.jobs)
        except BusyError:
            what = "many are asking; come back in a moment"
            raise RequestRefusedError(429, what, "busy", retry_after=retry_after) from None

    def _job(self, number: int, expected: Request, service: Scheduler) -> Job:
        def listen(event: Event) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        return Job(expected, service.engine, listen)

    async def events(self) -> AsyncIterator[tuple[int, str | Answer]]:
        """The answers as they grow.

        Yields:
            The answer's number, and a piece of its text, or at its end the whole.

        Raises:
            RequestRefusedError: An answer broke, or took too long.
        """
        left = len(self.jobs)
        try:
            while left:
                patience = self._deadline - time.monotonic()
                try:
                    number, event = await asyncio.wait_for(self._events.get(), max(0.0, patience))
                except asyncio.TimeoutError:
                    raise RequestRefusedError(504, "the answer took too long", "timeout") from None
                if isinstance(event, BusyError):
                    raise RequestRefusedError(503, "the server is shutting down", "shutting_down")
                if isinstance(event, Exception):
                    raise RuntimeError("an answer broke") from event
                left -= isinstance(event, Answer)
                yield number, event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End what has not ended: nobody wants it any more."""
        for job in self.jobs:
            job.cancel()

    async def answers(self, request: HttpRequest) -> list[Answer]:
        """All answers, whole; none if the client leaves.

        Args:
            request: The client's, whose body has been read.

        Returns:
            The answers in order.
        """

        async def _collect() -> list[Answer]:
            found = {number: event async for number, event in self.events() if isinstance(event, Answer)}
            return [found[number] for number in range(len(self.jobs))]

        async def _leave() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        collecting, leaving = asyncio.create_task(_collect()), asyncio.create_task(_leave())
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise RequestRefusedError(499, "the client left", "client_left")
            return collecting.result()
        finally:
            for task in (collecting, leaving):
                task.cancel()
            await asyncio.gather(collecting, leaving, return_exceptions=True)
