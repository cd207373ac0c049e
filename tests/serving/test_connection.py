"""Connections whose clients do not send or read are closed."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from llavar_peft import Chat
from llavar_peft.compat.server_internals import TimedConnection
from llavar_peft.serving.api.request_limits import RequestLimits
from tests.serving.server import ask_body, serving

PATIENCE = 60
"""Seconds after which a connection counts as never closed; the limits under test are below one second."""
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def port(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(TimedConnection, "head_seconds", 0.5)
    monkeypatch.setattr(TimedConnection, "stalled_seconds", 0.5)
    with serving(chat, limits=RequestLimits(body_seconds=0.3)) as (address, _):
        yield int(address.rpartition(":")[2])


def _ends(connection: socket.socket, begin: bytes = b"", drip: bytes = b"") -> bool:
    """Return whether the server closes a connection on which bytes arrive slowly, and does not wait forever."""
    deadline = time.monotonic() + PATIENCE
    connection.settimeout(0.1)
    with suppress(ConnectionError):
        connection.sendall(begin)
        while time.monotonic() < deadline:
            with suppress(TimeoutError):
                if not connection.recv(65536):
                    return True
            connection.sendall(drip)
        return False
    return True


def _read(connection: socket.socket, end: bytes) -> bytes:
    """Read a response, whose head and body arrive separately."""
    read = b""
    while not read.endswith(end):
        read += connection.recv(65536) or pytest.fail(f"the response is incomplete: {read!r}")
    return read


@pytest.mark.parametrize("drip", [b"", b"X-A: b\r\n"])
def test_a_missing_or_slow_head_ends_the_connection(drip: bytes, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        assert _ends(connection, b"GET /health HTTP/1.1\r\n" if drip else b"", drip)


def test_a_slow_second_head_ends_the_connection(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(2):
            connection.sendall(HEALTH)
            assert _read(connection, b'"ok"}').startswith(b"HTTP/1.1 200")
            time.sleep(0.3)  # shorter than the keep-alive time
        assert _ends(connection, HEALTH[:9], b"e")


def test_the_slow_rest_of_a_rejected_body_ends_the_connection(port: int) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head + b"Content-Length: 5000\r\n\r\n")
        assert _read(connection, b"}}").startswith(b"HTTP/1.1 408")
        assert _ends(connection, drip=b" ")


def test_a_client_that_does_not_read_is_disconnected(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TimedConnection, "stalled_seconds", 0.5)
    with serving(chat) as (address, app):
        app.add_api_route("/long", lambda: "x" * 30_000_000, methods=["GET"])
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
            connection.sendall(b"GET /long HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(2)
            connection.settimeout(5)
            read = 0
            with suppress(ConnectionError):
                while data := connection.recv(1 << 20):
                    read += len(data)
            assert read < 30_000_000


@pytest.mark.usefixtures("endless", "slow")
def test_a_slow_answer_does_not_end_the_connection(port: int) -> None:
    """The time limit of a head does not apply to an answer."""
    body = ask_body("Go on.", max_tokens=10)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        # Ten tokens at a tenth of a second each take longer than the limit.
        assert TimedConnection.head_seconds < 10 * 0.1
