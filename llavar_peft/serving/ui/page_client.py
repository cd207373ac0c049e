"""The page's client of the API, in the same process, so that the API's limits apply to the page."""

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

from llavar_peft.data.pdf_pages import locate_page, page_name

Message: TypeAlias = MutableMapping[str, Any]
App: TypeAlias = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

_PATH: Final = "/v1/chat/completions"
_CANCEL_SECONDS: Final = 5.0  # time that the API has to cancel an answer after the client left


_PLAIN_MESSAGES: Final = {
    "context_length_exceeded": "The question and the conversation are longer than the model can read. "
    "Please shorten the question, or start a new conversation.",
    "body_too_large": "The image file is too large. Please upload a smaller one.",
    "shutting_down": "The server is shutting down. Please ask again later.",
}
"""What the page says instead of the API's message, by its code."""


class PageClientError(Exception):
    """The API did not answer. The message is shown to the user."""


@dataclass(frozen=True, slots=True)
class PageClient:
    """A client that calls the API's application directly.

    Attributes:
        app: The API's application.
        models: Names of the models.
        max_tokens: Largest number of tokens in an answer.
        api_key: The API's key, if it has one.
    """

    app: App
    models: Sequence[str]
    max_tokens: int
    api_key: str | None = None

    async def stream(
        self,
        model: str,
        history: Sequence[tuple[str, str]],
        question: str,
        image: str | None,
        **sampling: float | int | None,
    ) -> AsyncGenerator[str, None]:
        """Ask a question, and yield the answer in pieces. Closing the generator cancels the answer.

        Args:
            model: One of ``models``.
            history: Earlier questions and answers.
            question: The question.
            image: Path of the image, or the pages of a PDF document, that the conversation is about, if any.
            **sampling: Fields of the API's request; None selects the API's default.

        Raises:
            PageClientError: The API did not answer.
        """
        body = {
            "model": model,
            "messages": _messages(history, question, await asyncio.to_thread(_data_url, image)),
            "stream": True,
            **{name: value for name, value in sampling.items() if value is not None},
        }
        async with self._post(json.dumps(body).encode()) as (status, headers, chunks):
            if status != 200:
                raise PageClientError(_error_message(status, headers, b"".join([chunk async for chunk in chunks])))
            async for event in _events(chunks):
                if "error" in event:
                    raise PageClientError("The answer was interrupted. Please ask again.")
                for choice in event["choices"]:
                    if choice["delta"].get("content"):
                        yield choice["delta"]["content"]

    @asynccontextmanager
    async def _post(self, body: bytes) -> AsyncIterator[tuple[int, dict[bytes, bytes], AsyncIterator[bytes]]]:
        """Send a request. Leaving the context disconnects the client."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        requests: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        left = asyncio.Event()

        async def receive() -> Message:
            if requests:
                return requests.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self.app(self._scope(len(body)), receive, messages.put)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            start = await messages.get()
            if start is None:
                raise PageClientError("The server could not answer. See its log for the reason.")
            headers = {name.lower(): value for name, value in start["headers"]}
            yield start["status"], headers, _bodies(messages)
        finally:
            left.set()
            await asyncio.wait([task], timeout=_CANCEL_SECONDS)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)  # the API logs exceptions

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
        text = {"type": "text", "text": messages[0]["content"]}
        messages[0]["content"] = [text, {"type": "image_url", "image_url": {"url": image}}]
    return messages


def _data_url(image: str | None) -> str | None:
    if image is None:
        return None
    file, pages = locate_page(image)
    kind = mimetypes.guess_type(file)[0] or "image/png"
    try:
        url = f"data:{kind};base64,{base64.b64encode(Path(file).read_bytes()).decode()}"
        return url if pages is None else page_name(url, pages)
    except FileNotFoundError:
        raise PageClientError("The image has expired. Please upload it again.") from None


async def _bodies(messages: asyncio.Queue[Message | None]) -> AsyncIterator[bytes]:
    while (message := await messages.get()) is not None:
        yield message.get("body", b"")
        if not message.get("more_body"):
            return


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON of each server-sent event."""
    rest = b""
    async for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])


def _error_message(status: int, headers: dict[bytes, bytes], body: bytes) -> str:
    """Return the message of an API error, which is meant for clients."""
    if status == 429:
        seconds = headers.get(b"retry-after", b"").decode("latin-1")
        return f"The server is busy. Please try again{f' in {seconds} seconds' if seconds.isdigit() else ' soon'}."
    try:
        error = json.loads(body)["error"]
        return _PLAIN_MESSAGES.get(error.get("code"), str(error["message"]))
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"The server could not answer ({status})."
