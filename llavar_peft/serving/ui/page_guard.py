"""What stands before the page: the key, the doors that are open, and what a browser may load.

Gradio brings doors that this page has no use for, among them some that fetch addresses for a client. Only those that
are named here are open.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import logging
import re
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from starlette.requests import Request

from llavar_peft.serving.api.middleware import App, Message, Receive, Scope, Send
from llavar_peft.serving.api.request_body import read_body
from llavar_peft.serving.api.request_limits import RequestLimits, RequestRefusedError

logger = logging.getLogger(__name__)

_API: Final = "/gradio_api/"
_DOORS: Final = re.compile(
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
    """ASGI middleware before the page, behind ``Gate``, which names requests; other paths go by untouched.

    With a key, a browser asks for it as the password (of any user); programs may also send it as the API's clients do.

    Args:
        app: What is guarded.
        prefix: Where the page is, as in ``/ui``.
        files: The only folder that files are given out of.
        api_key: The key, None for none.
    """

    def __init__(self, app: App, *, prefix: str, files: Path, api_key: str | None) -> None:
        self._app = app
        self._prefix = prefix
        self._files = files.resolve()
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answers it."""
        path = scope.get("path", "")
        if scope["type"] != "http" or not (path == self._prefix or path.startswith(f"{self._prefix}/")):
            await self._app(scope, receive, send)
            return
        try:
            self._admit(scope)
            if scope["method"] not in ("GET", "HEAD"):
                # The body first: Gradio itself would read on without end.
                receive = _replaying(await read_body(Request(scope, receive), RequestLimits()), receive)
        except RequestRefusedError as error:
            logger.info("request %s refused: %s", scope["state"]["request_id"], error.message)
            await _answer(send, error)
            return
        await self._app(self._with_bearer(scope), receive, _adding_headers(send))

    def _admit(self, scope: Scope) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._api_key is not None and not _knows(headers.get(b"authorization", b""), self._api_key):
            raise RequestRefusedError(401, "A key is needed.", "invalid_api_key")
        if _from_elsewhere(headers):
            raise RequestRefusedError(403, "Not from another site.", "wrong_origin")
        if not self._is_open(scope["path"][len(self._prefix) :]):
            raise RequestRefusedError(404, "Not found.", "not_found")

    def _is_open(self, path: str) -> bool:
        door = _DOORS.fullmatch(path)
        if door is None or door["file"] is None:
            return door is not None
        return "\0" not in path and Path(door["file"]).resolve().is_relative_to(self._files)

    def _with_bearer(self, scope: Scope) -> Scope:
        """The request as an API client would make it, for whoever looks at the key behind here."""
        if self._api_key is None:
            return scope
        others = [(name, value) for name, value in scope["headers"] if name.lower() != b"authorization"]
        return {**scope, "headers": [*others, (b"authorization", b"Bearer " + self._api_key.encode())]}


def _knows(authorization: bytes, api_key: str) -> bool:
    kind, _, given = authorization.partition(b" ")
    if kind.lower() == b"basic":
        try:
            given = base64.b64decode(given.strip(), validate=True).partition(b":")[2]
        except binascii.Error:
            return False
    elif kind.lower() != b"bearer":
        return False
    return hmac.compare_digest(given, api_key.encode())


def _from_elsewhere(headers: MutableMapping[bytes, bytes]) -> bool:
    """Whether another site's page has made the browser ask."""
    origin = headers.get(b"origin")
    return origin is not None and urlsplit(origin.decode("latin-1")).netloc != headers.get(b"host", b"").decode(
        "latin-1"
    )


def _replaying(body: bytes, receive: Receive) -> Receive:
    left: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replaying() -> Message:
        return left.pop() if left else await receive()

    return replaying


def _adding_headers(send: Send) -> Send:
    async def adding(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *_HEADERS]
        await send(message)

    return adding


async def _answer(send: Send, error: RequestRefusedError) -> None:
    challenge = [_CHALLENGE] if error.status == 401 else []
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *challenge, *_HEADERS]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": error.message.encode()})
