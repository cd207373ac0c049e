"""Access control of the page: API key, allowed paths, allowed files, and what a browser may load.

Gradio brings endpoints that this page does not use, some of which download URLs for a client. Only the paths listed
here are served. In a mounted page, Gradio 6.31 also copies any file of the machine, and downloads any URL, that a
client names in any field; so files in a request have to be uploads.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import logging
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from starlette.requests import Request

from llavar_peft.atomic_files import is_disk_full
from llavar_peft.serving.api.middleware import App, Message, Receive, Scope, Send
from llavar_peft.serving.api.request_limits import BodyBudget, RequestLimits, RequestRejectedError, receive_body

logger = logging.getLogger(__name__)

_LONGEST_JSON: Final = 1_000_000
"""Bytes of a body that is no upload. It names uploaded files and holds a question; as objects it takes more memory."""

_API: Final = "/gradio_api/"
_ALLOWED_PATHS: Final = re.compile(
    r"/?|/config|/theme\.css|/(assets|static)/.*"
    rf"|{_API}(app_id|cancel|info|queue/join|queue/data|reset|startup-events|upload|upload_progress)/?"
    rf"|{_API}heartbeat/\w+"
    rf"|{_API}(call/\w+(/\w+)?|run/\w+)"
    rf"|{_API}file=(?P<file>.+)",
    flags=re.DOTALL,
)
_POLICY: Final = (
    b"default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline';"
    b" img-src 'self' data: blob:; media-src 'self' blob:; worker-src 'self' blob:; font-src 'self' data:;"
    b" connect-src 'self' blob: data:; object-src 'none'; base-uri 'self'; form-action 'self';"
    b" frame-ancestors 'none'"
)
_HEADERS: Final = ((b"content-security-policy", _POLICY), (b"referrer-policy", b"no-referrer"))
_CHALLENGE: Final = (b"www-authenticate", b'Basic realm="llavar-peft"')


class PageGuard:
    """ASGI middleware between ``RequestMiddleware`` and the page. Paths outside the page are not changed.

    With an API key, a browser asks for it as the password of any user; programs may send it as a bearer token.

    Args:
        app: The application behind it.
        prefix: The page's path, e.g. ``/ui``.
        files: The folder of uploads and examples, the only one whose files are served and accepted.
        api_key: The required key; None requires none.
        budget: The memory of all bodies, shared with the API.
    """

    def __init__(
        self, app: App, *, prefix: str, files: Path, api_key: str | None, budget: BodyBudget | None = None
    ) -> None:
        self._limits = RequestLimits()
        self._budget = budget or BodyBudget(self._limits.all_bodies_bytes)
        self._app = app
        self._prefix = prefix
        self._files = files.resolve()
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or reject it."""
        path = scope.get("path", "")
        if scope["type"] != "http" or not (path == self._prefix or path.startswith(f"{self._prefix}/")):
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
            if scope["method"] in ("GET", "HEAD"):
                await self._app(self._with_bearer(scope), receive, _add_headers(send))
                return
            # Read the body here: Gradio sets no limit to it.
            is_upload = path[len(self._prefix) :].rstrip("/") == f"{_API}upload"
            most = None if is_upload else _LONGEST_JSON
            async with receive_body(Request(scope, receive), self._limits, self._budget, most_bytes=most) as body:
                replayed = _replay(body if is_upload else self._check_files(body), receive)
                run = self._store if is_upload else self._app
                await run(self._with_bearer(scope), replayed, _add_headers(send))
        except RequestRejectedError as error:
            logger.info("request %s rejected: %s", scope["state"]["request_id"], error.message)
            await _send_error(send, error)

    async def _store(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an upload on, and say what the disk says where Gradio answers "Internal Server Error"."""
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        try:
            # Some systems remove old temporary files, also those of a server that has run for days.
            self._files.mkdir(mode=0o700, parents=True, exist_ok=True)
            await self._app(scope, receive, keep)
        except OSError as error:
            logger.error("an upload cannot be stored in %s (%s)", self._files, error.strerror or error)
            what = "The server cannot store the image: " + (
                "its disk is full." if is_disk_full(error) else "see its log."
            )
            raise RequestRejectedError(507, what, "not_stored") from error
        for message in answer:
            await send(message)

    def _check(self, scope: Scope) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._api_key is not None and not _has_key(headers.get(b"authorization", b""), self._api_key):
            raise RequestRejectedError(401, "The API key is missing or wrong.", "invalid_api_key")
        if _is_cross_origin(headers):
            raise RequestRejectedError(403, "Requests from other sites are not allowed.", "wrong_origin")
        allowed = _ALLOWED_PATHS.fullmatch(scope["path"][len(self._prefix) :])
        if allowed is None or (allowed["file"] is not None and not self._is_upload(allowed["file"])):
            raise RequestRejectedError(404, "Not found.", "not_found")

    def _check_files(self, body: bytes) -> bytes:
        """Return a body whose files are all uploads, written again so that Gradio reads the JSON that was checked."""
        if not body.strip():
            return body
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            raise RequestRejectedError(400, "The body is not valid JSON.", "invalid_request") from None
        if not all(path is None or self._is_upload(path) for path in _file_paths(document)):
            raise RequestRejectedError(400, "Files have to be uploaded to this page.", "not_uploaded")
        return json.dumps(document).encode()

    def _is_upload(self, path: Any) -> bool:
        return isinstance(path, str) and "\0" not in path and Path(path).resolve().is_relative_to(self._files)

    def _with_bearer(self, scope: Scope) -> Scope:
        """Return the request with the key as a bearer token, which the application behind may check."""
        if self._api_key is None:
            return scope
        others = [(name, value) for name, value in scope["headers"] if name.lower() != b"authorization"]
        return {**scope, "headers": [*others, (b"authorization", b"Bearer " + self._api_key.encode())]}


def _file_paths(document: Any) -> Iterator[Any]:
    """Yield the ``path`` of all objects, at any depth, that Gradio might take for a file."""
    values = [document]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            if "path" in value:
                yield value["path"]
            values += value.values()
        elif isinstance(value, list):
            values += value


def _has_key(authorization: bytes, api_key: str) -> bool:
    scheme, _, given = authorization.partition(b" ")
    if scheme.lower() == b"basic":
        try:
            given = base64.b64decode(given.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return False
    elif scheme.lower() != b"bearer":
        return False
    return hmac.compare_digest(given, api_key.encode())


def _is_cross_origin(headers: MutableMapping[bytes, bytes]) -> bool:
    """Return True if another site's page made the browser send the request."""
    origin, host = headers.get(b"origin"), headers.get(b"host", b"").decode("latin-1")
    return origin is not None and urlsplit(origin.decode("latin-1")).netloc != host


def _replay(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()

    return replayed


def _add_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *_HEADERS]
        await send(message)

    return send_with_headers


async def _send_error(send: Send, error: RequestRejectedError) -> None:
    challenge = [_CHALLENGE] if error.status == 401 else []
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *challenge, *_HEADERS]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": error.message.encode()})
