"""The answers to one request, passed from the decoding thread to the server's event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from fastapi import Request as HttpRequest

from llavar_peft.errors import LlavarError
from llavar_peft.inference.generation_request import Answer, Request
from llavar_peft.serving.api.chat_messages import context_error
from llavar_peft.serving.api.request_limits import RequestLimits, RequestRejectedError, busy_error, shutdown_error
from llavar_peft.serving.api.scheduler import BusyError, Event, Job, Scheduler


class ResponseStream:
    """Waits for the answers to a request, and cancels them when the client disconnects.

    Args:
        scheduler: Computes the answers.
        requests: One request per answer.
        deadline: The end of the answers' time, by ``time.monotonic``.
        limits: Limits of a request.
        client: The client that asked, for ``Job``.

    Raises:
        RequestRejectedError: The queue is full, the prompt is too long, or the server shuts down.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        requests: Sequence[Request],
        *,
        deadline: float,
        limits: RequestLimits,
        client: str = "",
    ) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._deadline = deadline
        try:
            self.jobs = [self._job(number, one, scheduler) for number, one in enumerate(requests)]
        except LlavarError:
            raise context_error() from None
        try:
            scheduler.submit(self.jobs)
        except BusyError:
            raise (shutdown_error() if scheduler.closed else busy_error(limits)) from None

    def _job(self, number: int, request: Request, scheduler: Scheduler) -> Job:
        def listen(event: Event) -> None:
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        return Job(request, scheduler.engine, listen, self._client)

    async def events(self) -> AsyncIterator[tuple[int, str | Answer]]:
        """Yield pieces of text and, at the end of each answer, the complete answer.

        Yields:
            The answer's index, and a piece of its text or the answer.

        Raises:
            RequestRejectedError: An answer took too long, or the server shuts down.
        """
        left = len(self.jobs)
        try:
            while left:
                remaining = self._deadline - time.monotonic()
                try:
                    number, event = await asyncio.wait_for(self._events.get(), max(0.0, remaining))
                except asyncio.TimeoutError:
                    raise RequestRejectedError(504, "The answer took too long.", "timeout") from None
                if isinstance(event, BusyError):
                    raise shutdown_error()
                if isinstance(event, Exception):
                    raise RuntimeError("an answer failed") from event
                left -= isinstance(event, Answer)
                yield number, event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Cancel the answers that are not complete."""
        for job in self.jobs:
            job.cancel()

    async def collect(self, request: HttpRequest) -> list[Answer]:
        """Return all answers in order.

        Args:
            request: The client's request, whose body has been read.

        Raises:
            RequestRejectedError: The client disconnected, or as for ``events``.
        """

        async def _collect() -> list[Answer]:
            found = {number: event async for number, event in self.events() if isinstance(event, Answer)}
            return [found[number] for number in range(len(self.jobs))]

        async def _wait_for_disconnect() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        collecting, leaving = asyncio.create_task(_collect()), asyncio.create_task(_wait_for_disconnect())
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise RequestRejectedError(499, "The client disconnected.", "client_left")
            return collecting.result()
        finally:
            for task in (collecting, leaving):
                task.cancel()
            await asyncio.gather(collecting, leaving, return_exceptions=True)
