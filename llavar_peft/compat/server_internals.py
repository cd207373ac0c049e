"""Parts of uvicorn that have no public equivalent."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedConnection(H11Protocol):
    """An HTTP connection that is closed when the client stops sending its request or stops reading the response.

    Replaces: timeouts for a request's head and for an unread response, which uvicorn does not have. Its settings
    (``timeout_keep_alive``, ``h11_max_incomplete_event_size``, ``limit_concurrency``) limit idle connections and sizes
    only, so that a few clients which hold connections open could keep all others out.

    Needed from uvicorn 0.32, the oldest supported version, to 0.54.

    The class is passed as the public argument ``http`` of ``uvicorn.Config`` and overrides the callbacks of
    ``asyncio.Protocol`` only. It reads three undocumented attributes of uvicorn's class: ``loop``, ``transport`` and
    ``cycle``, which is None before the first request and otherwise tells in ``response_complete`` whether a response
    is under way.
    """

    head_seconds: ClassVar[float] = 15.0
    """Seconds from the connection, or from the first byte after a response, to the end of a request's head."""
    stalled_seconds: ClassVar[float] = 30.0
    """Seconds that a response waits, with 64 KiB unread, until the client continues to read."""

    _head_timer: asyncio.TimerHandle | None = None
    _stalled_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Start the timer for the first head."""
        super().connection_made(transport)
        self._update_head_timer()

    def data_received(self, data: bytes) -> None:
        """Process data, and stop the timer when the head is complete."""
        super().data_received(data)
        self._update_head_timer()

    def pause_writing(self) -> None:
        """Start the timer for a client that has stopped reading."""
        super().pause_writing()
        if self._stalled_timer is None:
            self._stalled_timer = self.loop.call_later(self.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timer when the client reads again."""
        super().resume_writing()
        if self._stalled_timer is not None:
            self._stalled_timer.cancel()
            self._stalled_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop both timers."""
        super().connection_lost(exc)
        for timer in (self._head_timer, self._stalled_timer):
            if timer is not None:
                timer.cancel()

    def _update_head_timer(self) -> None:
        # Data does not extend the time: a client that sends a head, or the rest of a rejected body, byte by byte would
        # never be disconnected.
        if self.cycle is not None and not self.cycle.response_complete:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self.transport.abort)
