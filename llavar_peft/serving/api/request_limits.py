"""Limits of a request, the error that rejects one, and the reading of a body within the limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from starlette.requests import ClientDisconnect, Request

from llavar_peft.data.json_schema import SchemaLimits

_SCHEMA: Final = SchemaLimits(size=32_000, depth=64, parts=500)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """Limits that are enforced while a request is read, before anything in it is decoded.

    Attributes:
        body_bytes: Size of a request's body.
        all_bodies_bytes: Memory of all bodies that are received at the same time; further requests get status 429.
        body_seconds: Time to send the body.
        body_grace_seconds: Time after which a body has to keep to ``body_rate``.
        body_rate: Slowest average speed of a body, in bytes per second. A client that sends single bytes would hold a
            connection for the whole ``body_seconds``.
        images: Number of images in a request; a PDF document counts as one.
        pages: Number of pages of all PDF documents in a request.
        page_seconds: Time of computing for a page of a PDF document.
        image_bytes: Size of an image file.
        pixels: Number of pixels of an image, read from its header.
        decoding: Number of images decoded at the same time; each takes a few bytes per pixel.
        new_tokens: Number of tokens in an answer.
        choices: Number of answers to one request (``n``).
        rows: Number of answers computed at the same time.
        waiting: Number of answers in the queue; further requests get status 429.
        seconds: Time from a request's arrival to its last token.
        schema: What the JSON Schema may be that an answer has to follow.
        retry_after: Seconds after which a client that got status 429 may try again.
    """

    body_bytes: int = 20_000_000
    all_bodies_bytes: int = 256_000_000
    body_seconds: float = 30.0
    body_grace_seconds: float = 5.0
    body_rate: int = 20_000
    images: int = 4
    pages: int = 20
    page_seconds: float = 5.0
    image_bytes: int = 20_000_000
    pixels: int = 50_000_000
    decoding: int = 2
    new_tokens: int = 2048
    choices: int = 8
    rows: int = 16
    waiting: int = 64
    seconds: float = 300.0
    schema: SchemaLimits = _SCHEMA
    retry_after: int = 5


class RequestRejectedError(Exception):
    """A request that is not answered. All its arguments are sent to the client.

    Args:
        status: HTTP status.
        message: A short text without internal details.
        code: Identifier for programs.
        param: The field at fault.
        retry_after: Seconds after which the client may try again.
    """

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """Return the error as in OpenAI's API."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def shutdown_error() -> RequestRejectedError:
    """Return the error for a request whose answer the end of the server interrupts."""
    return RequestRejectedError(503, "The server is shutting down.", "shutting_down")


def busy_error(limits: RequestLimits) -> RequestRejectedError:
    """Return the error for a request that finds the queue full."""
    return RequestRejectedError(
        429, f"The server is busy. Try again in {limits.retry_after} seconds.", "busy", retry_after=limits.retry_after
    )


class BodyBudget:
    """The memory that bodies of requests take together, in bytes. The API and the page share one.

    Args:
        limit: The largest number of bytes; further requests get status 429.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0

    def reserve(self, count: int) -> bool:
        """Reserve memory, and return whether there was enough."""
        if self._held + count > self._limit:
            return False
        self._held += count
        return True

    def release(self, count: int) -> None:
        """Release memory that was reserved."""
        self._held -= count


@asynccontextmanager
async def receive_body(
    request: Request, limits: RequestLimits, budget: BodyBudget, *, most_bytes: int | None = None
) -> AsyncIterator[bytes]:
    """Read a request's body, which counts in the budget until the context ends.

    Args:
        request: The request, whose body has not been read.
        limits: Limits of a request.
        budget: The memory of all bodies.
        most_bytes: Size of this body; None is that of the limits.

    Raises:
        RequestRejectedError: The body is too large, too slow or incomplete, or there is no memory for it.
    """
    most = limits.body_bytes if most_bytes is None else most_bytes
    too_large = RequestRejectedError(413, f"The body is larger than {most} bytes.", "body_too_large")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared[:20]) > most:
        raise too_large
    body, start, blocks = bytearray(), time.monotonic(), request.stream()
    try:
        while (block := await _next_block(blocks, start, len(body), limits)) is not None:
            if len(body) + len(block) > most:
                raise too_large
            if not budget.reserve(len(block)):
                raise busy_error(limits)
            body += block
        yield bytes(body)
    except ClientDisconnect:
        message = "The connection was closed before the body was complete."
        raise RequestRejectedError(400, message, "body_broken") from None
    finally:
        budget.release(len(body))


async def _next_block(blocks: AsyncIterator[bytes], start: float, received: int, limits: RequestLimits) -> bytes | None:
    """Wait for a part of a body, as long as the whole body keeps to the limits of time and speed."""
    allowed = min(limits.body_seconds, limits.body_grace_seconds + received / limits.body_rate)
    try:
        return await asyncio.wait_for(anext(blocks, None), max(0.0, start + allowed - time.monotonic()))
    except asyncio.TimeoutError:
        raise RequestRejectedError(
            408,
            f"The body did not arrive within {limits.body_seconds:g} seconds, or more slowly than "
            f"{limits.body_rate / 1000:g} kB per second.",
            "body_too_slow",
        ) from None
