"""Servers for the tests: on a socket, or called in the same process."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from fastapi import FastAPI
from PIL import Image

from llavar_peft import Chat
from llavar_peft.serving.api.api_app import create_app
from llavar_peft.serving.run_server import bind_socket, make_server
from llavar_peft.serving.ui.mount_page import mount_page

MODEL = "tiny"
JSON = ((b"host", b"localhost"), (b"content-type", b"application/json"))


@contextmanager
def serving(chat: Chat, *, ui: bool = False, **settings: Any) -> Iterator[tuple[str, FastAPI]]:
    """Run a server on a free port until the context ends, and yield its URL and application."""
    app = create_app(chat.engine, name=MODEL, **settings)
    if ui:
        names = [MODEL, *chat.adapters]
        mount_page(app, models=names, max_tokens=app.state.limits.new_tokens, api_key=settings.get("api_key"))
    bound = bind_socket("127.0.0.1", 0)
    server = make_server(app, shutdown_seconds=1)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{bound.getsockname()[1]}", app
    finally:
        server.should_exit = True
        thread.join()


@dataclass
class Reply:
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The parsed body."""
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """The message of an error."""
        return str(self.json["error"]["message"])


async def call(
    app: Any,
    body: bytes | Iterable[bytes] = b"",
    *,
    method: str = "POST",
    path: str = "/v1/chat/completions",
    headers: Sequence[tuple[bytes, bytes]] = JSON,
    pause: float = 0.0,
) -> Reply:
    """Send a request by ASGI; each part of the body is a message, after a pause (seconds)."""
    parts = iter([body] if isinstance(body, bytes) else body)
    sent: list[Any] = []
    complete = False

    async def receive() -> Any:
        nonlocal complete
        await asyncio.sleep(3600 if complete else pause)  # the client stays connected
        part = next(parts, None)
        complete = part is None
        return {"type": "http.request", "body": part or b"", "more_body": part is not None}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"",
        "headers": list(headers), "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    await app(scope, receive, send)
    answered = {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]}
    return Reply(sent[0]["status"], answered, b"".join(message.get("body", b"") for message in sent[1:]))


def ask_body(text: str, *urls: str, **fields: Any) -> bytes:
    """Return the body of a request with images, by default with greedy sampling and a short answer."""
    parts = [{"type": "text", "text": text}, *({"type": "image_url", "image_url": {"url": url}} for url in urls)]
    body = {"model": MODEL, "messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 4}
    return json.dumps(body | fields).encode()


def png(width: int = 40, height: int = 30, colour: str = "red") -> bytes:
    """Return a PNG file."""
    file = BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def progressive(more: int = 0) -> bytes:
    """Return a progressive JPEG whose last scan is repeated."""
    file = BytesIO()
    Image.new("L", (640, 480), 90).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (1 + more) + data[-2:]


def data_url(data: bytes, kind: str = "image/png") -> str:
    """Return a data URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


class Neighbour:
    """A server in the same network that counts connections."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.visits = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.visits += 1
            connection.close()

    def close(self) -> None:
        self._socket.close()
