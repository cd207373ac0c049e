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
from llavar_peft.serving.api.request_limits import (
    BodyBudget,
    RequestLimits,
    RequestRejectedError,
    busy_error,
    receive_body,
    shutdown_error,
)
from llavar_peft.serving.api.response_stream import ResponseStream
from llavar_peft.serving.api.scheduler import Scheduler

logger = logging.getLogger(__name__)

_GET = ("GET", "HEAD")
_NO_SUCH_PATH = "There is no such path. The API has /v1/chat/completions and /v1/models; serve --ui adds a page at /ui."


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
    images, budget = (
        RequestImageReader(engine.processor, limits, domains=media_domains),
        BodyBudget(limits.all_bodies_bytes),
    )
    api = _Api(scheduler, images, metrics, limits, name, budget)

    @asynccontextmanager
    async def _lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        api.close()
        await asyncio.to_thread(scheduler.close)

    # FastAPI's documentation pages load scripts from another host.
    app = FastAPI(title="llavar-peft", docs_url=None, redoc_url=None, openapi_url=None, lifespan=_lifespan)
    app.add_api_route("/v1/chat/completions", api.complete, methods=["POST"], response_model=None)
    for path, answer in (
        ("/v1/models", api.models), ("/v1/models/{model:path}", api.model), ("/health", api.health),
        ("/metrics", api.metrics_text),
    ):  # fmt: skip
        app.add_api_route(path, answer, methods=list(_GET), response_model=None)
    app.add_exception_handler(RequestRejectedError, _handle_rejection)
    app.add_exception_handler(HTTPException, _handle_http_error)
    app.add_middleware(RequestMiddleware, api_key=api_key, hosts=hosts, metrics=metrics)
    if origins:
        # Outermost: a browser's preflight request carries no key, and errors need the header as well.
        app.add_middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client for browsers sends about ten headers of its own
            expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip
    app.state.scheduler = scheduler
    app.state.limits = limits
    app.state.body_budget = budget
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
        self,
        scheduler: Scheduler,
        images: RequestImageReader,
        metrics: Metrics,
        limits: RequestLimits,
        name: str,
        budget: BodyBudget,
    ) -> None:
        self._scheduler = scheduler
        self._images = images
        self._metrics = metrics
        self._limits = limits
        self._models: Mapping[str, str | None] = {name: None, **{one: one for one in scheduler.engine.adapters}}
        self._created = int(time.time())
        self._reading = 0
        self._budget = budget
        # A token stands for at most as many characters as the longest one has.
        longest = max(map(len, scheduler.engine.processor.tokenizer.get_vocab()))
        self._most_characters = scheduler.engine.context * longest
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
        client = "" if request.client is None else request.client.host
        self._check_json(request)
        self._check_room(client)
        async with receive_body(request, self._limits, self._budget) as body:
            with self._reserve_reading():
                chat, generations = await self._read(body, deadline)
        stream = ResponseStream(
            self._scheduler, generations, deadline=deadline, limits=self._limits, client=client
        )  # fmt: skip
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": chat.model}
        if chat.stream:
            return _EventStream(self._events(stream, chat, head), stream)
        answers = await stream.collect(request)
        usage = self._count(answers)
        choices = [self._choice(number, answer) for number, answer in enumerate(answers)]
        return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": usage})

    @contextmanager
    def _reserve_reading(self) -> Iterator[None]:
        """Limit the number of requests that are parsed, which takes memory and time, to what could be answered.

        A request counts from the end of its body, so that slow bodies keep no one out.
        """
        if self._reading >= self._limits.waiting + self._limits.rows:
            raise busy_error(self._limits)
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    def _check_room(self, client: str) -> None:
        """Reject a request that cannot be answered before its body is read."""
        if self._scheduler.closed:
            raise shutdown_error()
        if self._scheduler.is_full(client):
            raise busy_error(self._limits)

    def _check_json(self, request: Request) -> None:
        # Another site's page can make a browser send forms and plain text to this server, but not JSON.
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise RequestRejectedError(
                415, "The Content-Type header has to be application/json.", "unsupported_media_type"
            )
        if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
            raise RequestRejectedError(
                415, "The Content-Encoding header is not supported. Send the body uncompressed.", "unsupported_encoding"
            )

    async def _read(self, body: bytes, deadline: float) -> tuple[ChatRequest, list[GenerationRequest]]:
        chat = await asyncio.to_thread(parse_request, body)
        if chat.model not in self._models:
            raise _unknown_model()
        read = partial(
            read_conversation, chat, self._scheduler.engine.processor, self._images, self._limits,
            adapter=self._models[chat.model], most_characters=self._most_characters,
            grammars=lambda: self._scheduler.engine.grammars,
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
        counts = chat.stream_options is not None and bool(chat.stream_options.include_usage)

        def chunk(*choices: dict[str, Any], usage: dict[str, int] | None = None) -> str:
            event = {**head, "object": "chat.completion.chunk", "choices": list(choices)}
            return _format_event({**event, "usage": usage} if counts else event)

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
        if counts:
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
    status, headers = (error.status_code, error.headers) if isinstance(error, HTTPException) else (500, None)
    message = "The method is not allowed." if status == 405 else _NO_SUCH_PATH
    return JSONResponse(RequestRejectedError(status, message, "not_found").body(), status, headers)


def _unknown_model() -> RequestRejectedError:
    what = "The model does not exist. GET /v1/models lists the models."
    return RequestRejectedError(404, what, "model_not_found", param="model")


def _format_event(value: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
