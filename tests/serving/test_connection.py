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

TIMEOUT = 3
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def port(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(TimedConnection, "head_seconds", 0.5)
    monkeypatch.setattr(TimedConnection, "stalled_seconds", 0.5)
    with serving(chat, limits=RequestLimits(body_seconds=0.3)) as (address, _):
        yield int(address.rpartition(":")[2])


def _ends(connection: socket.socket, begin: bytes = b"", drip: bytes = b"") -> float:
    """Return the seconds until the server closes a connection on which bytes arrive slowly."""
    began = time.monotonic()
    connection.settimeout(0.1)
    with suppress(ConnectionError):
        connection.sendall(begin)
        while time.monotonic() - began < TIMEOUT:
            with suppress(TimeoutError):
                if not connection.recv(65536):
                    break
            connection.sendall(drip)
    return time.monotonic() - began


def _read(connection: socket.socket, end: bytes) -> bytes:
    """Read a response, whose head and body arrive separately."""
    read = b""
    while not read.endswith(end):
        read += connection.recv(65536) or pytest.fail(f"the response is incomplete: {read!r}")
    return read


@pytest.mark.parametrize("drip", [b"", b"X-A: b\r\n"])
def test_a_missing_or_slow_head_ends_the_connection(drip: bytes, port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        assert 0.3 < _ends(connection, b"GET /health HTTP/1.1\r\n" if drip else b"", drip) < TIMEOUT


def test_a_slow_second_head_ends_the_connection(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(2):
            connection.sendall(HEALTH)
            assert _read(connection, b'"ok"}').startswith(b"HTTP/1.1 200")
            time.sleep(0.3)  # shorter than the keep-alive time
        assert 0.3 < _ends(connection, HEALTH[:9], b"e") < TIMEOUT


def test_the_slow_rest_of_a_rejected_body_ends_the_connection(port: int) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head + b"Content-Length: 5000\r\n\r\n")
        assert _read(connection, b"}}").startswith(b"HTTP/1.1 408")
        assert 0.3 < _ends(connection, drip=b" ") < TIMEOUT


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
        began = time.monotonic()
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        assert time.monotonic() - began > TimedConnection.head_seconds
