"""What ``TimedConnection`` relies on in uvicorn."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from llavar_peft.compat.server_internals import TimedConnection

REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def test_only_callbacks_of_asyncio_are_overridden() -> None:
    overridden = [name for name, value in vars(TimedConnection).items() if inspect.isfunction(value)]
    public = [name for name in overridden if not name.startswith("_")]
    assert len(public) == 5
    assert all(hasattr(asyncio.Protocol, name) and hasattr(H11Protocol, name) for name in public)
    assert [name for name in overridden if name not in public] == ["_update_head_timer"]
    assert not hasattr(H11Protocol, "_update_head_timer")
    assert not hasattr(H11Protocol, "_head_timer")
    assert not hasattr(H11Protocol, "_stalled_timer")


def test_uvicorn_has_no_timeout_for_a_head_or_an_unread_response() -> None:
    """When uvicorn gains one, use it instead of this class."""
    timeouts = {name for name in inspect.signature(uvicorn.Config).parameters if "timeout" in name}
    assert timeouts <= {
        "timeout_keep_alive", "timeout_graceful_shutdown", "timeout_notify", "timeout_worker_healthcheck",
        "ws_ping_timeout",
    }  # fmt: skip


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The attributes that are read, at each callback of one connection that sends one request."""
    seen: list[Any] = []
    respond = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await respond.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    class Recorded(TimedConnection):
        def _update_head_timer(self) -> None:
            super()._update_head_timer()
            complete = None if self.cycle is None else self.cycle.response_complete
            seen.append((complete, self._head_timer is not None, self.loop, self.transport))

    async def exchange() -> None:
        config = uvicorn.Config(app, http=Recorded, lifespan="off", port=0, log_level="critical")
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for part, callbacks in ((REQUEST[:10], 2), (REQUEST[10:], 3), (REQUEST[:10], 4)):
            if callbacks == 4:
                respond.set()
                await reader.readuntil(b"\r\n\r\n")
            writer.write(part)
            while len(seen) < callbacks:
                await asyncio.sleep(0.01)
        writer.close()
        server.should_exit = True
        await running
        assert seen[0][2] is asyncio.get_running_loop()

    asyncio.run(asyncio.wait_for(exchange(), 30))
    return seen


def test_the_request_cycle_tells_whether_a_response_is_under_way(states: list[Any]) -> None:
    # Connected; half a head; the whole head; half of the next head after the response.
    assert [complete for complete, *_ in states] == [None, None, False, True]


def test_the_head_is_timed_only_while_it_is_awaited(states: list[Any]) -> None:
    assert [timed for _, timed, *_ in states] == [True, True, False, True]
    assert all(isinstance(transport, asyncio.Transport) for *_, transport in states)
