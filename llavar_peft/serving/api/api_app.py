"""The OpenAI-compatible API over one model and its adapters.

Source: OpenAI's API reference, ``/v1/chat/completions`` and ``/v1/models``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from llavar_peft.inference.engine import Engine
from llavar_peft.inference.generation_request import Answer
from llavar_peft.inference.generation_request import Request as GenerationRequest
from llavar_peft.serving.api.api_schema import ChatRequest, count_usage, format_logprobs, parse_request
from llavar_peft.serving.api.chat_messages import read_conversation
from llavar_peft.serving.api.middleware import Metrics, Receive, RequestMiddleware, Scope, Send, escape_for_log
from llavar_peft.serving.api.request_images import RequestImageReader
from llavar_peft.serving.api.request_limits import RequestLimits, RequestRejectedError, busy_error, read_body
from llavar_peft.serving.api.response_stream import ResponseStream
from llavar_peft.serving.api.scheduler import Scheduler

logger = logging.getLogger(__name__)


def create_app(
    engine: Engine,
    *,
    name: str,
    limits: RequestLimits | None = None,
    api_key: str | None = None,
    hosts: frozenset[str] | None = None,
    media_domains: frozenset[str] = frozenset(),
    origins: Sequence[str] = (),
) -> FastAPI:
    """Create the server's application, which owns the engine until it shuts down.

    Args:
        engine: The model and its adapters; clients address each adapter as a model.
        name: The name under which clients address the model without an adapter.
        limits: Limits of a request.
        api_key: The key required on ``/v1`` and ``/metrics``.
        hosts: Values of the ``Host`` header that are accepted; None accepts any.
        media_domains: Hosts from which images may be downloaded.
        origins: Origins of web pages that browsers let use the API (CORS), such as ``"http://localhost:3000"``.
    """
    limits = limits or RequestLimits()
    metrics, scheduler = Metrics(), Scheduler(engine, rows=limits.rows, waiting=limits.waiting)
    api = _Api(scheduler, RequestImageReader(engine.processor, limits, domains=media_domains), metrics, limits, name)

    @asynccontextmanager
    async def _lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        api.close()
        await asyncio.to_thread(scheduler.close)

    # FastAPI's documentation pages load scripts from another host.
    app = FastAPI(title="llavar-peft", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_lifespan)
    app.add_api_route("/v1/chat/completions", api.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", api.models, methods=["GET"])
    app.add_api_route("/v1/models/{model:path}", api.model, methods=["GET"])
    app.add_api_route("/health", api.health, methods=["GET"])
    app.add_api_route("/metrics", api.metrics_text, methods=["GET"], response_model=None)
    app.add_exception_handler(RequestRejectedError, _handle_rejection)
    app.add_exception_handler(HTTPException, _handle_http_error)
    app.add_middleware(RequestMiddleware, api_key=api_key, hosts=hosts, metrics=metrics)
    if origins:
        # Outermost: a browser's preflight request carries no key, and errors need the header as well.
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"], expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip
    app.state.scheduler = scheduler
    app.state.limits = limits
    return app


class _EventStream(StreamingResponse):
    """A stream whose answers are cancelled even when the client disconnects before the first event."""

    def __init__(self, events: AsyncIterator[str], answers: ResponseStream) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()


class _Api:
    def __init__(
        self, scheduler: Scheduler, images: RequestImageReader, metrics: Metrics, limits: RequestLimits, name: str
    ) -> None:
        self._scheduler = scheduler
        self._images = images
        self._metrics = metrics
        self._limits = limits
        self._models: Mapping[str, str | None] = {name: None, **{one: one for one in scheduler.engine.adapters}}
        self._created = int(time.time())
        self._reading = 0
        self._image_threads = ThreadPoolExecutor(4 * limits.decoding, thread_name_prefix="llavar-images")

    def close(self) -> None:
        """Stop opening images."""
        self._image_threads.shutdown(wait=False, cancel_futures=True)

    async def models(self) -> dict[str, Any]:
        """List the model and each adapter."""
        return {"object": "list", "data": [self._describe(name) for name in self._models]}

    async def model(self, model: str) -> dict[str, Any]:
        """Describe the model or an adapter by its name."""
        if model not in self._models:
            raise _unknown_model()
        return self._describe(model)

    def _describe(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "llavar-peft"}

    async def health(self) -> dict[str, str]:
        """Report that the server runs."""
        return {"status": "ok"}

    async def metrics_text(self) -> PlainTextResponse:
        """Return the counters for Prometheus."""
        text = self._metrics.text(running=self._scheduler.running, waiting=self._scheduler.waiting)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def complete(self, request: Request) -> Response:
        """Return a chat completion, as one document or as a stream of server-sent events."""
        deadline = time.monotonic() + self._limits.seconds
        with self._reserve_reading():
            chat, generations = await self._read(request, deadline)
        stream = ResponseStream(self._scheduler, generations, deadline=deadline, limits=self._limits)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat.model}
        if chat.stream:
            return _EventStream(self._events(stream, chat, head), stream)
        answers = await stream.collect(request)
        usage = self._count(answers)
        choices = [self._choice(number, answer) for number, answer in enumerate(answers)]
        return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": usage})

    @contextmanager
    def _reserve_reading(self) -> Iterator[None]:
        """Limit the number of requests that are read, which takes memory and time, to what could be answered."""
        limits, scheduler = self._limits, self._scheduler
        if self._reading + scheduler.waiting + scheduler.running >= limits.waiting + limits.rows:
            raise busy_error(limits)
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    async def _read(self, request: Request, deadline: float) -> tuple[ChatRequest, list[GenerationRequest]]:
        # Another site's page can make a browser send forms and plain text to this server, but not JSON.
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise RequestRejectedError(
                415, "The Content-Type header has to be application/json.", "unsupported_media_type"
            )
        body = await read_body(request, self._limits)
        chat = await asyncio.to_thread(parse_request, body)
        if chat.model not in self._models:
            raise _unknown_model()
        read = partial(
            read_conversation, chat, self._scheduler.engine.processor, self._images, self._limits,
            adapter=self._models[chat.model],
        )  # fmt: skip
        # A separate pool of threads, so that requests without images do not wait for images.
        threads = self._image_threads if b"image_url" in body else None
        reading = asyncio.get_running_loop().run_in_executor(threads, read)
        try:
            return chat, await asyncio.wait_for(reading, max(0.0, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise RequestRejectedError(504, "Reading the request took too long.", "timeout") from None

    def _choice(self, number: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": number,
            "message": {"role": "assistant", "content": answer.text},
            "finish_reason": "length" if answer.finish_reason == "cancelled" else answer.finish_reason,
            "logprobs": format_logprobs(answer, self._scheduler.engine.processor.tokenizer),
        }

    async def _events(self, stream: ResponseStream, chat: ChatRequest, head: Mapping[str, Any]) -> AsyncIterator[str]:
        def chunk(*choices: dict[str, Any], **more: Any) -> str:
            return _format_event({**head, "object": "chat.completion.chunk", "choices": list(choices), **more})

        def part(number: int, delta: dict[str, str], reason: str | None = None, logprobs: Any = None) -> dict[str, Any]:
            return {"index": number, "delta": delta, "finish_reason": reason, "logprobs": logprobs}

        for number in range(len(stream.jobs)):
            yield chunk(part(number, {"role": "assistant", "content": ""}))
        answers: dict[int, Answer] = {}
        try:
            async for number, event in stream.events():
                if isinstance(event, str):
                    yield chunk(part(number, {"content": event}))
                else:
                    answers[number] = event
                    choice = self._choice(number, event)
                    yield chunk(part(number, {}, choice["finish_reason"], choice["logprobs"]))
        except RequestRejectedError as error:  # status 200 was already sent
            yield _format_event(error.body())
            return
        usage = self._count(list(answers.values()))
        if chat.stream_options is not None and chat.stream_options.include_usage:
            yield chunk(usage=usage)
        yield "data: [DONE]\n\n"

    def _count(self, answers: list[Answer]) -> dict[str, int]:
        usage = count_usage(answers)
        self._metrics.count_tokens(usage["prompt_tokens"], usage["completion_tokens"])
        return usage


async def _handle_rejection(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestRejectedError):
        raise error
    headers = None if error.retry_after is None else {"retry-after": str(error.retry_after)}
    cause = "" if error.__cause__ is None else f" ({escape_for_log(repr(error.__cause__))})"
    logger.info("request %s rejected: %s%s", request.state.request_id, error.message, cause)
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def _handle_http_error(_: Request, error: Exception) -> JSONResponse:
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = "The method is not allowed." if status == 405 else "There is no such path."
    return JSONResponse(RequestRejectedError(status, message, "not_found").body(), status)


def _unknown_model() -> RequestRejectedError:
    what = "The model does not exist. GET /v1/models lists the models."
    return RequestRejectedError(404, what, "model_not_found", param="model")


def _format_event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
