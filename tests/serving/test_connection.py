"""Connections whose clients do not send or read are closed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from llavar_peft import Chat
from llavar_peft.compat.server_internals import TimedConnection
from llavar_peft.serving.api.request_limits import RequestLimits
from llavar_peft.serving.run_server import make_server
from tests.serving.server import ask_body, serving

PATIENCE = 120
"""Seconds after which a connection counts as never closed."""
LIMIT = 60.0
"""Of a head and of an unread response, in seconds of the clock that the tests move."""
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
Move = Callable[[float], None]


@pytest.fixture
def server(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, FastAPI]]:
    monkeypatch.setattr(TimedConnection, "head_seconds", LIMIT)
    monkeypatch.setattr(TimedConnection, "stalled_seconds", LIMIT)

    def make(*given: Any, **named: Any) -> uvicorn.Server:
        made = make_server(*given, **named)
        made.config.timeout_keep_alive = 10_000  # the clock moves, and idle connections stay
        return made

    monkeypatch.setattr("tests.serving.server.make_server", make)
    with serving(chat, limits=RequestLimits(body_seconds=LIMIT, seconds=10_000)) as (address, app):
        yield int(address.rpartition(":")[2]), app


@pytest.fixture
def port(server: tuple[int, FastAPI]) -> int:
    return server[0]


def _ends(connection: socket.socket, pass_time: Move, begin: bytes = b"", drip: bytes = b"") -> bool:
    """Return whether the server closes a connection on which bytes arrive slowly, and does not wait forever."""
    deadline = time.perf_counter() + PATIENCE
    connection.settimeout(0.1)
    with suppress(ConnectionError):
        connection.sendall(begin)
        while time.perf_counter() < deadline:
            with suppress(TimeoutError):
                if not connection.recv(65536):
                    return True
            connection.sendall(drip)
            pass_time(0.6 * LIMIT)
        return False
    return True


def _read(connection: socket.socket, end: bytes) -> bytes:
    """Read a response, whose head and body arrive separately."""
    read = b""
    while not read.endswith(end):
        read += connection.recv(65536) or pytest.fail(f"the response is incomplete: {read!r}")
    return read


@pytest.mark.parametrize("drip", [b"", b"X-A: b\r\n"])
def test_a_missing_or_slow_head_ends_the_connection(drip: bytes, port: int, pass_time: Move) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        assert _ends(connection, pass_time, b"GET /health HTTP/1.1\r\n" if drip else b"", drip)


def test_a_slow_second_head_ends_the_connection(port: int, pass_time: Move) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(2):
            connection.sendall(HEALTH)
            assert _read(connection, b'"ok"}').startswith(b"HTTP/1.1 200")
            pass_time(2 * LIMIT)  # an idle connection is not limited by the time of a head
            time.sleep(0.2)  # the server looks at its clock ten times a second
        assert _ends(connection, pass_time, HEALTH[:9], b"e")


def test_the_slow_rest_of_a_rejected_body_ends_the_connection(port: int, pass_time: Move) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head + b"Content-Length: 5000\r\nExpect: 100-continue\r\n\r\n")
        assert _read(connection, b"\r\n\r\n").startswith(b"HTTP/1.1 100")  # from here on the body is timed
        pass_time(2 * LIMIT)
        assert _read(connection, b"}}").startswith(b"HTTP/1.1 408")
        assert _ends(connection, pass_time, drip=b" ")


def test_a_client_that_does_not_read_is_disconnected(
    server: tuple[int, FastAPI], pass_time: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, plain = threading.Event(), TimedConnection.connection_lost
    monkeypatch.setattr(TimedConnection, "connection_lost", lambda *given: (plain(*given), lost.set()))
    port, app = server
    app.add_api_route("/long", lambda: "x" * 30_000_000, methods=["GET"])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /long HTTP/1.1\r\nHost: localhost\r\n\r\n")
        deadline = time.perf_counter() + PATIENCE
        while not lost.wait(0.1) and time.perf_counter() < deadline:
            pass_time(0.6 * LIMIT)
        connection.settimeout(PATIENCE)
        read = 0
        with suppress(ConnectionError):
            while data := connection.recv(1 << 20):
                read += len(data)
        assert lost.is_set()
        assert read < 30_000_000


@pytest.mark.usefixtures("endless", "slow")
def test_a_slow_answer_does_not_end_the_connection(server: tuple[int, FastAPI], pass_time: Move) -> None:
    """The time limit of a head does not apply to an answer."""
    port, app = server
    body = ask_body("Go on.", max_tokens=10)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        deadline = time.perf_counter() + PATIENCE
        while not app.state.scheduler.running and time.perf_counter() < deadline:
            time.sleep(0.01)
        pass_time(2 * LIMIT)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
