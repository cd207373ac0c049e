"""A request's body, read no further and no longer than is accepted."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from llavar_peft.serving.api.request_limits import RequestLimits, RequestRefusedError


async def read_body(request: Request, limits: RequestLimits) -> bytes:
    """Read a request's body, and stops as soon as it is too large or takes too long.

    Args:
        request: Whose body was not read yet.
        limits: What is accepted.

    Returns:
        The bytes.

    Raises:
        RequestRefusedError: It is too large, too slow, or broke off.
    """
    too_large = RequestRefusedError(413, f"the body is larger than {limits.body_bytes} bytes", "body_too_large")
    said = request.headers.get("content-length", "0")
    if said.isdigit() and int(said[:20]) > limits.body_bytes:
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
        raise RequestRefusedError(408, "the body took too long", "body_too_slow") from None
    except ClientDisconnect:
        raise RequestRefusedError(400, "the body broke off", "body_broken") from None
