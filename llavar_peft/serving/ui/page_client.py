"""How the page asks: as any client of the API does, within the process. So the API's limits are the page's."""

from __future__ import annotations

import asyncio
import base64
import json
import mimetypes
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

Message: TypeAlias = MutableMapping[str, Any]
App: TypeAlias = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

_PATH: Final = "/v1/chat/completions"
_PATIENCE: Final = 5.0  # seconds that the API has to notice that nobody listens any more


class PageRefusedError(Exception):
    """The API did not answer; the text is for the user."""


@dataclass(frozen=True, slots=True)
class PageClient:
    """A client of an API in the same process.

    Attributes:
        app: The API.
        models: What can be asked, by the names that the API gives.
        most_tokens: That an answer can have.
        api_key: The API's, if it has one.
    """

    app: App
    models: Sequence[str]
    most_tokens: int
    api_key: str | None = None

    async def stream(
        self,
        model: str,
        history: Sequence[tuple[str, str]],
        question: str,
        image: str | None,
        **sampling: float | int | None,
    ) -> AsyncGenerator[str, None]:
        """Ask, and gives the answer out as it comes. Nobody taking more of it ends it.

        Args:
            model: One of ``models``.
            history: Questions and answers before this one.
            question: In plain words.
            image: The file that the first question is about, if there is one.
            **sampling: As the API names it; None is the API's default.

        Yields:
            Pieces of text.

        Raises:
            PageRefusedError: There is no answer.
        """
        body = {
            "model": model,
            "messages": _messages(history, question, await asyncio.to_thread(_data_url, image)),
            "stream": True,
            **{name: value for name, value in sampling.items() if value is not None},
        }
        async with self._post(json.dumps(body).encode()) as (status, headers, chunks):
            if status != 200:
                raise PageRefusedError(_reason(status, headers, b"".join([chunk async for chunk in chunks])))
            async for event in _events(chunks):
                if "error" in event:
                    raise PageRefusedError("The answer broke off. Ask again.")
                for choice in event["choices"]:
                    if choice["delta"].get("content"):
                        yield choice["delta"]["content"]

    @asynccontextmanager
    async def _post(self, body: bytes) -> AsyncIterator[tuple[int, dict[bytes, bytes], AsyncIterator[bytes]]]:
        """One request. Leaving the context is what closing the connection is to a client elsewhere."""
        answered: asyncio.Queue[Message | None] = asyncio.Queue()
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        left = asyncio.Event()

        async def receive() -> Message:
            if waiting:
                return waiting.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self.app(self._scope(len(body)), receive, answered.put)
            finally:
                answered.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            start = await answered.get()
            if start is None:
                raise PageRefusedError("The server could not answer. Its log says why.")
            headers = {name.lower(): value for name, value in start["headers"]}
            yield start["status"], headers, _bodies(answered)
        finally:
            left.set()
            await asyncio.wait([task], timeout=_PATIENCE)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)  # the API has logged what it was

    def _scope(self, length: int) -> MutableMapping[str, Any]:
        headers = [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(length).encode()),
        ]
        if self.api_key is not None:
            headers.append((b"authorization", b"Bearer " + self.api_key.encode()))
        return {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": _PATH, "raw_path": _PATH.encode(), "root_path": "", "query_string": b"",
            "headers": headers, "client": ("127.0.0.1", 0), "server": ("127.0.0.1", 0),
        }  # fmt: skip


def _messages(history: Sequence[tuple[str, str]], question: str, image: str | None) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for asked, answered in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    messages.append({"role": "user", "content": question})
    if image is not None:
        words = {"type": "text", "text": messages[0]["content"]}
        messages[0]["content"] = [words, {"type": "image_url", "image_url": {"url": image}}]
    return messages


def _data_url(image: str | None) -> str | None:
    if image is None:
        return None
    kind = mimetypes.guess_type(image)[0] or "image/png"
    try:
        return f"data:{kind};base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
    except FileNotFoundError:
        raise PageRefusedError("The picture is no longer here. Drop it again.") from None


async def _bodies(answered: asyncio.Queue[Message | None]) -> AsyncIterator[bytes]:
    while (message := await answered.get()) is not None:
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])


def _reason(status: int, headers: dict[bytes, bytes], body: bytes) -> str:
    """What the API says of a request that it refused, which is short and meant for clients."""
    if status == 429:
        seconds = headers.get(b"retry-after", b"").decode("latin-1")
        return f"Many are asking. Try again{f' in {seconds} s' if seconds.isdigit() else ' soon'}."
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"The server could not answer ({status})."
