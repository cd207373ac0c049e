"""The OpenAI-compatible API over one model and its adapters.

Source: OpenAI's API reference, ``/v1/chat/completions`` and ``/v1/models``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from llavar_peft.inference.engine import Engine
from llavar_peft.inference.generation_request import Answer
from llavar_peft.inference.generation_request import Request as Wanted
from llavar_peft.serving.api.api_schema import ChatRequest, logprobs_of, parse_request, usage
from llavar_peft.serving.api.chat_messages import read_conversation
from llavar_peft.serving.api.middleware import Receive, RequestMiddleware, Scope, Send, plain
from llavar_peft.serving.api.request_body import read_body
from llavar_peft.serving.api.request_images import RequestImageReader
from llavar_peft.serving.api.request_limits import RequestLimits, RequestRefusedError
from llavar_peft.serving.api.response_stream import ResponseStream
from llavar_peft.serving.api.scheduler import Scheduler
from llavar_peft.serving.api.server_metrics import Metrics

logger = logging.getLogger(__name__)


def create_app(
    engine: Engine,
    *,
    name: str,
    limits: RequestLimits | None = None,
    api_key: str | None = None,
    hosts: frozenset[str] | None = None,
    media_domains: frozenset[str] = frozenset(),
) -> FastAPI:
    """Make the server's application; it owns the engine until it shuts down.

    Args:
        engine: The model with its adapters, each of which is a model to clients.
        name: What clients call the model without an adapter.
        limits: What clients may ask for.
        api_key: Asked for on ``/v1`` and ``/metrics``.
        hosts: Names that the server answers to; None is any.
        media_domains: Hosts that images may be fetched from.

    Returns:
        The application.
    """
    caps = limits or RequestLimits()
    metrics, service = Metrics(), Scheduler(engine, rows=caps.rows, waiting=caps.waiting)
    api = _Api(service, RequestImageReader(engine.processor, caps, domains=media_domains), metrics, caps, name)

    @asynccontextmanager
    async def _alive(_: FastAPI) -> AsyncIterator[None]:
        yield
        api.close()
        await asyncio.to_thread(service.close)

    # Its documentation pages take their scripts from elsewhere.
    app = FastAPI(title="llavar-peft", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_alive)
    app.add_api_route("/v1/chat/completions", api.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", api.models, methods=["GET"])
    app.add_api_route("/health", api.health, methods=["GET"])
    app.add_api_route("/metrics", api.metrics_text, methods=["GET"], response_model=None)
    app.add_exception_handler(RequestRefusedError, _refused)
    app.add_exception_handler(HTTPException, _not_here)
    app.add_middleware(RequestMiddleware, api_key=api_key, hosts=hosts, metrics=metrics)
    app.state.service = service
    app.state.limits = caps
    return app


class _EventStream(StreamingResponse):
    """A stream whose answers are cancelled also when the client leaves before its first event."""

    def __init__(self, events: AsyncIterator[str], reply: ResponseStream) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reply.cancel()


class _Api:
    def __init__(
        self, service: Scheduler, images: RequestImageReader, metrics: Metrics, limits: RequestLimits, name: str
    ) -> None:
        self._service = service
        self._images = images
        self._metrics = metrics
        self._limits = limits
        self._models: Mapping[str, str | None] = {name: None, **{one: one for one in service.engine.adapters}}
        self._since = int(time.time())
        self._reading = 0
        self._openers = ThreadPoolExecutor(4 * limits.decoding, thread_name_prefix="llavar-pictures")

    def close(self) -> None:
        """Begins no further image."""
        self._openers.shutdown(wait=False, cancel_futures=True)

    async def models(self) -> dict[str, Any]:
        """The model and each adapter."""
        about = {"object": "model", "created": self._since, "owned_by": "llavar-peft"}
        return {"object": "list", "data": [{"id": name, **about} for name in self._models]}

    async def health(self) -> dict[str, str]:
        """That the server is there."""
        return {"status": "ok"}

    async def metrics_text(self) -> PlainTextResponse:
        """Count for Prometheus."""
        text = self._metrics.text(running=self._service.running, waiting=self._service.waiting)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def complete(self, request: Request) -> Response:
        """A chat completion, whole or as a stream of server-sent events."""
        deadline = time.monotonic() + self._limits.seconds
        with self._admitted():
            asked, expected = await self._read(request, deadline)
        reply = ResponseStream(self._service, expected, deadline=deadline, retry_after=self._limits.retry_after)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        if asked.stream:
            return _EventStream(self._stream(reply, asked, head), reply)
        answers = await reply.answers(request)
        self._count(answers)
        choices = [self._choice(number, answer) for number, answer in enumerate(answers)]
        return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": usage(answers)})

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """While a request is read, which costs memory and time: not of more than could be answered."""
        limits, service = self._limits, self._service
        if self._reading + service.waiting + service.running >= limits.waiting + limits.rows:
            raise RequestRefusedError(
                429, "many are asking; come back in a moment", "busy", retry_after=limits.retry_after
            )
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    async def _read(self, request: Request, deadline: float) -> tuple[ChatRequest, list[Wanted]]:
        # A page elsewhere can send forms and plain text to this machine unasked, but not JSON.
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestRefusedError(415, "send application/json", "unsupported_media_type")
        body = await read_body(request, self._limits)
        asked = await asyncio.to_thread(parse_request, body)
        if asked.model not in self._models:
            raise RequestRefusedError(
                404, "there is no such model; GET /v1/models lists them", "model_not_found", param="model"
            )
        read = partial(
            read_conversation, asked, self._service.engine.processor, self._images, self._limits,
            adapter=self._models[asked.model],
        )  # fmt: skip
        # Threads of their own: whoever sends words alone does not wait for images.
        reading = asyncio.get_running_loop().run_in_executor(self._openers if b"image_url" in body else None, read)
        try:
            return asked, await asyncio.wait_for(reading, max(0.0, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise RequestRefusedError(504, "reading the request took too long", "timeout") from None

    def _choice(self, number: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": number,
            "message": {"role": "assistant", "content": answer.text},
            "finish_reason": "length" if answer.finish_reason == "cancelled" else answer.finish_reason,
            "logprobs": logprobs_of(answer, self._service.engine.processor.tokenizer),
        }

    async def _stream(self, reply: ResponseStream, asked: ChatRequest, head: Mapping[str, Any]) -> AsyncIterator[str]:
        def chunk(*choices: dict[str, Any], **more: Any) -> str:
            return _event({**head, "object": "chat.completion.chunk", "choices": list(choices), **more})

        def part(number: int, delta: dict[str, str], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
            return {"index": number, "delta": delta, "finish_reason": reason, "logprobs": logprobs}

        for number in range(len(reply.jobs)):
            yield chunk(part(number, {"role": "assistant", "content": ""}))
        answers: dict[int, Answer] = {}
        try:
            async for number, event in reply.events():
                if isinstance(event, str):
                    yield chunk(part(number, {"content": event}))
                else:
                    answers[number] = event
                    choice = self._choice(number, event)
                    yield chunk(part(number, {}, choice["finish_reason"], choice["logprobs"]))
        except RequestRefusedError as error:  # the status is out already
            yield _event(error.body())
            return
        self._count(list(answers.values()))
        if asked.stream_options is not None and asked.stream_options.include_usage:
            yield chunk(usage=usage(list(answers.values())))
        yield "data: [DONE]\n\n"

    def _count(self, answers: list[Answer]) -> None:
        used = usage(answers)
        self._metrics.count_tokens(used["prompt_tokens"], used["completion_tokens"])


async def _refused(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestRefusedError):
        raise error
    headers = None if error.retry_after is None else {"retry-after": str(error.retry_after)}
    why = "" if error.__cause__ is None else f" ({plain(repr(error.__cause__))})"
    logger.info("request %s refused: %s%s", request.state.request_id, error.message, why)
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _not_here(_: Request, error: Exception) -> JSONResponse:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return JSONResponse(
        RequestRefusedError(status, "there is nothing here for this request", "not_found").body(), status
    )


def _event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
