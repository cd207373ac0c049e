"""Checks and records that apply to every request: host, API key, request ID, log line, metrics and error response."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from llavar_peft.serving.api.request_limits import RequestRejectedError, shutdown_error

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger(__name__)

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?")
_WRONG_HOST = (
    "The host name of the request is not allowed. Start the server with --allow-host NAME, or with an API key, or let "
    "the proxy send the header Host: localhost."
)
_PROTECTED = ("/v1/", "/metrics")
_OWN_PATHS = ("/v1/", "/health/", "/metrics/")
_SINGLE_HEADERS = (b"host", b"authorization", b"content-type", b"content-encoding", b"origin")
_COUNTED_PATHS = frozenset({"/v1/chat/completions", "/v1/models", "/health", "/metrics"})


class Metrics:
    """Counters of requests and tokens since the server's start. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds = 0.0
        self._tokens: Counter[str] = Counter()

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count a completed request; the status is 0 if the client disconnected before a response."""
        with self._lock:
            self._requests[path if path in _COUNTED_PATHS else "other", status] += 1
            self._seconds += seconds

    def count_tokens(self, prompt: int, completion: int) -> None:
        """Count the tokens of a request."""
        with self._lock:
            self._tokens["prompt"] += prompt
            self._tokens["completion"] += completion

    def text(self, *, running: int, waiting: int) -> str:
        """Return all counters in Prometheus' exposition format 0.0.4, with the present number of answers by state."""
        with self._lock:
            lines = ["# TYPE llavar_requests_total counter"]
            for (path, status), count in sorted(self._requests.items()):
                lines.append(f'llavar_requests_total{{path="{path}",status="{status}"}} {count}')
            lines += [
                "# TYPE llavar_request_seconds_total counter",
                f"llavar_request_seconds_total {self._seconds:.6f}",
                "# TYPE llavar_tokens_total counter",
                *(f'llavar_tokens_total{{kind="{kind}"}} {self._tokens[kind]}' for kind in ("prompt", "completion")),
                "# TYPE llavar_answers gauge",
                f'llavar_answers{{state="running"}} {running}',
                f'llavar_answers{{state="waiting"}} {waiting}',
            ]
        return "\n".join(lines) + "\n"


class RequestMiddleware:
    """The outermost ASGI middleware.

    Args:
        app: The application behind it.
        api_key: The key required on the API's paths; None requires none.
        hosts: Values of the ``Host`` header that are accepted; None accepts any. This stops DNS rebinding: another
            site can point its own name at 127.0.0.1, but cannot change the header that the browser sends.
        metrics: Counts the requests.
    """

    def __init__(self, app: App, *, api_key: str | None, hosts: frozenset[str] | None, metrics: Metrics) -> None:
        self.app = app
        self._key = None if api_key is None else api_key.encode()
        self._hosts = hosts
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request and pass it on; turn any exception into a short response and a log entry."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, begin, status, ended = uuid.uuid4().hex, time.perf_counter(), 0, False
        scope.setdefault("state", {})["request_id"] = request_id
        if scope["path"].startswith(_OWN_PATHS):  # a redirect would lead to the server's own name and scheme
            scope["path"] = scope["path"].rstrip("/")

        async def send_with_id(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                message = {**message, "headers": [*headers, (b"x-content-type-options", b"nosniff")]}
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, send_with_id)
        except RequestRejectedError as error:
            await _send_error(send_with_id, error, started=bool(status))
        except asyncio.CancelledError:
            # The server cancels what still runs when its time to stop is over. A raised cancellation would be logged
            # with a traceback, and the client would get status 500, or a stream that breaks off.
            if status and not ended:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            elif not status:
                await _send_error(send_with_id, shutdown_error(), started=False)
        except Exception:
            logger.exception("request %s failed", request_id)
            internal = RequestRejectedError(500, f"Internal error. The request ID is {request_id}.", "internal")
            await _send_error(send_with_id, internal, started=bool(status))
        finally:
            seconds = time.perf_counter() - begin
            self._metrics.count_request(scope["path"], status, seconds)
            path = escape_for_log(scope["path"])
            logger.info("%s %s %d %.3fs %s", scope["method"], path, status, seconds, request_id)

    def _check(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        names = [name for name, _ in scope["headers"]]
        if any(names.count(name) > 1 for name in _SINGLE_HEADERS):
            # Programs differ in which of two they use.
            raise RequestRejectedError(400, "A header that may be given once is given twice.", "duplicate_header")
        if self._hosts is not None:
            host = _HOST.fullmatch(headers.get(b"host", b"").decode("latin-1"))
            if host is None or host[1].lower() not in self._hosts:
                raise RequestRejectedError(421, _WRONG_HOST, "wrong_host")
        if self._key is None or not scope["path"].startswith(_PROTECTED):
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            raise RequestRejectedError(401, "The API key is missing or wrong.", "invalid_api_key")


async def _send_error(send: Send, error: RequestRejectedError, *, started: bool) -> None:
    if started:
        return  # the status was sent, so the response can only end
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def escape_for_log(text: str) -> str:
    """Return the first 200 characters of a client's text without line breaks and control characters."""
    return text[:200].encode("unicode_escape").decode()
