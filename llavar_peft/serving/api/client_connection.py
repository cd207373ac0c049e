"""A client's connection, which ends when the client does neither its asking nor its reading."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol


class ClientConnection(H11Protocol):
    """uvicorn waits without end for a request's head and for whoever reads nothing of an answer; here both end.

    The server takes a limited number of connections, so those who only hold them would keep others out.
    """

    head_seconds: ClassVar[float] = 15.0
    """From a connection, or from the first byte on one that is kept, to the end of a request's head."""
    stalled_seconds: ClassVar[float] = 30.0
    """That an answer waits, with 64 KiB unread, until the client reads on."""

    _head: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Begins to wait for the head."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Wait on, or no longer."""
        super().data_received(data)
        self._watch_head()

    def pause_writing(self) -> None:
        """The client has not read for a while."""
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads on."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for."""
        super().connection_lost(exc)
        for timer in (self._head, self._stalled):
            if timer is not None:
                timer.cancel()

    def _watch_head(self) -> None:
        """Data prolongs nothing: whoever drips, a head or the rest of a body that was refused, would never end."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self._head is not None:
                self._head.cancel()
                self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(self.head_seconds, self.transport.abort)
