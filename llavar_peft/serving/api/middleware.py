"""What every request passes before anything else: its host, its key, its name in the log, its time and its size."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from llavar_peft.serving.api.request_limits import RequestRefusedError
from llavar_peft.serving.api.server_metrics import Metrics

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})
_GUARDED = ("/v1/", "/metrics")


class RequestMiddleware:
    """ASGI middleware, the outermost.

    Args:
        app: What is behind it.
        api_key: Asked for on the API's paths; None asks nobody.
        hosts: Names that this server answers to; None answers to any. A page elsewhere can make its own name mean
            127.0.0.1, but it cannot change what the browser says it asked for.
        metrics: Counts.
    """

    def __init__(self, app: App, *, api_key: str | None, hosts: frozenset[str] | None, metrics: Metrics) -> None:
        self.app = app
        self._key = None if api_key is None else api_key.encode()
        self._hosts = hosts
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuses it; whatever breaks behind becomes a short answer and a line in the log.

        Args:
            scope: Of ASGI.
            receive: Of ASGI.
            send: Of ASGI.
        """
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name, started, status = uuid.uuid4().hex, time.perf_counter(), 0
        scope.setdefault("state", {})["request_id"] = name

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", name.encode())]
                message = {**message, "headers": [*headers, (b"x-content-type-options", b"nosniff")]}
            await send(message)

        try:
            self._admit(scope)
            await self.app(scope, receive, named)
        except RequestRefusedError as error:
            await _refuse(named, error, begun=bool(status))
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("request %s", name)
            await _refuse(
                named, RequestRefusedError(500, f"internal error, request {name}", "internal"), begun=bool(status)
            )
        finally:
            seconds = time.perf_counter() - started
            self._metrics.count_request(scope["path"], status, seconds)
            logger.info("%s %s %d %.3fs %s", scope["method"], plain(scope["path"]), status, seconds, name)

    def _admit(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self._hosts is not None:
            host = _HOST.fullmatch(headers.get(b"host", b"").decode("latin-1"))
            if host is None or host[1].lower() not in self._hosts:
                raise RequestRefusedError(421, "this server does not answer to that name", "wrong_host")
        if self._key is None or not scope["path"].startswith(_GUARDED):
            return
        given = headers.get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self._key):
            raise RequestRefusedError(401, "the API key is missing or wrong", "invalid_api_key")


async def _refuse(send: Send, error: RequestRefusedError, *, begun: bool) -> None:
    if begun:
        return  # the status is out already; the stream ends
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def plain(text: str) -> str:
    """What may stand in a log: without line breaks or control characters of a client's making.

    Args:
        text: The client's.

    Returns:
        Its beginning.
    """
    return text[:200].encode("unicode_escape").decode()
