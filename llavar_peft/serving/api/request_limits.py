"""Limits of a request, the error that rejects one, and the reading of a body within the limits."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """Limits that are enforced while a request is read, before anything in it is decoded.

    Attributes:
        body_bytes: Size of a request's body.
        body_seconds: Time to send the body.
        images: Number of images in a request.
        image_bytes: Size of an image file.
        pixels: Number of pixels of an image, read from its header.
        decoding: Number of images decoded at the same time; each takes a few bytes per pixel.
        new_tokens: Number of tokens in an answer.
        choices: Number of answers to one request (``n``).
        rows: Number of answers computed at the same time.
        waiting: Number of answers in the queue; further requests get status 429.
        seconds: Time from a request's arrival to its last token.
        retry_after: Seconds after which a client that got status 429 may try again.
    """

    body_bytes: int = 20_000_000
    body_seconds: float = 30.0
    images: int = 4
    image_bytes: int = 20_000_000
    pixels: int = 50_000_000
    decoding: int = 2
    new_tokens: int = 2048
    choices: int = 8
    rows: int = 16
    waiting: int = 64
    seconds: float = 300.0
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


def busy_error(limits: RequestLimits) -> RequestRejectedError:
    """Return the error for a request that finds the queue full."""
    return RequestRejectedError(
        429, f"The server is busy. Try again in {limits.retry_after} seconds.", "busy", retry_after=limits.retry_after
    )


async def read_body(request: Request, limits: RequestLimits) -> bytes:
    """Read a request's body, and stop as soon as it is too large or takes too long.

    Raises:
        RequestRejectedError: The body is too large, too slow or incomplete.
    """
    too_large = RequestRejectedError(413, f"The body is larger than {limits.body_bytes} bytes.", "body_too_large")
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared[:20]) > limits.body_bytes:
        raise too_large

    async def _read() -> bytes:
        body = bytearray()
        async for block in request.stream():
            body += block
            if len(body) > limits.body_bytes:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(_read(), limits.body_seconds)
    except asyncio.TimeoutError:
        raise RequestRejectedError(
            408, f"The body did not arrive within {limits.body_seconds:g} seconds.", "body_too_slow"
        ) from None
    except ClientDisconnect:
        message = "The connection was closed before the body was complete."
        raise RequestRejectedError(400, message, "body_broken") from None
