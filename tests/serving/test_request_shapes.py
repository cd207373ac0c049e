"""Requests in the shapes that OpenAI's clients send: what is accepted, what is joined, and what errors name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI

from llavar_peft.inference.chat import Chat
from llavar_peft.inference.generation_request import Request
from llavar_peft.serving.api.api_app import create_app
from llavar_peft.serving.api.api_schema import parse_request
from llavar_peft.serving.api.chat_messages import read_conversation
from llavar_peft.serving.api.request_images import RequestImageReader
from llavar_peft.serving.api.request_limits import RequestLimits, RequestRejectedError
from llavar_peft.serving.run_server import check_listen_address
from tests.serving.server import MODEL, call, data_url, png

URL = data_url(png())
TEXT = {"type": "text", "text": "Read."}
IMAGE = {"type": "image_url", "image_url": {"url": URL}}
HELLO = {"role": "user", "content": "Hello"}
NULLS = (
    "stream", "stream_options", "temperature", "top_p", "max_tokens", "max_completion_tokens", "n", "seed", "stop",
    "logprobs", "top_logprobs", "tools", "functions", "response_format", "logit_bias", "presence_penalty",
    "frequency_penalty", "user", "metadata", "store", "reasoning_effort", "parallel_tool_calls", "tool_choice",
)  # fmt: skip


@pytest.fixture
def app(chat: Chat) -> Iterator[FastAPI]:
    made = create_app(chat.engine, name=MODEL)
    yield made
    made.state.scheduler.close()


def _read(chat: Chat, messages: Any, **fields: Any) -> Request:
    body = json.dumps({"model": MODEL, "messages": messages, **fields}).encode()
    processor, limits = chat.engine.processor, RequestLimits()
    images = RequestImageReader(processor, limits)
    return read_conversation(parse_request(body), processor, images, limits, adapter=None)[0]


def _text(chat: Chat, messages: Any) -> str:
    request = _read(chat, messages)
    tokenizer = chat.engine.processor.tokenizer
    patch = tokenizer.convert_tokens_to_ids("<im_patch>")
    return str(tokenizer.decode([token for token in request.ids.tolist() if token != patch]))


@pytest.mark.parametrize("field", NULLS)
def test_null_is_as_good_as_absent(field: str, chat: Chat) -> None:
    assert _read(chat, [HELLO], **{field: None}).sampling == _read(chat, [HELLO]).sampling


@pytest.mark.parametrize(
    ("content", "images"),
    [
        ("Read.", 0), ([TEXT], 0), ([TEXT, TEXT], 0), (["Read."], 0), ([TEXT, IMAGE], 1), ([IMAGE, TEXT], 1),
        ([IMAGE], 1), ([TEXT, {"type": "image_url", "image_url": URL}], 1),
        ([TEXT, {"type": "image_url", "image_url": {"url": URL, "detail": "high"}}], 1),
        ([TEXT, {"type": "image_url", "image_url": {"url": URL, "detail": None}}], 1),
        ([{**TEXT, "cache_control": {"type": "ephemeral"}}, IMAGE, IMAGE], 2), ("", 0), ([], 0),
        ([TEXT, {"type": "image_url", "image_url": URL.replace("image/png;", "image/png;charset=utf-8;")}], 1),
        ([TEXT, {"type": "image_url", "image_url": URL[:60] + "\r\n" + URL[60:90] + "\n" + URL[90:]}], 1),
    ],
)  # fmt: skip
def test_contents_that_are_accepted(content: Any, images: int, chat: Chat) -> None:
    assert len(_read(chat, [{"role": "user", "content": content}]).images) == images


@pytest.mark.parametrize(
    ("messages", "same_as"),
    [
        ([HELLO, {"role": "user", "content": "again"}], [{"role": "user", "content": "Hello\nagain"}]),
        (
            [{"role": "user", "content": [IMAGE]}, {"role": "user", "content": "Read."}],
            [{"role": "user", "content": [IMAGE, TEXT]}],
        ),
        ([{"role": "assistant", "content": "Hi!"}, HELLO], [HELLO]),
        ([{"role": "assistant", "content": "Hi!"}, {"role": "assistant", "content": "You?"}, HELLO], [HELLO]),
        (
            [HELLO, {"role": "assistant", "content": "A"}, {"role": "assistant", "content": "B"}, HELLO],
            [HELLO, {"role": "assistant", "content": "A\nB"}, HELLO],
        ),
        (
            [HELLO, {"role": "assistant", "content": None}, HELLO],
            [HELLO, {"role": "assistant", "content": ""}, HELLO],
        ),
        ([HELLO, {"role": "assistant"}, HELLO], [HELLO, {"role": "assistant", "content": ""}, HELLO]),
        ([{"role": "user", "content": "Hello", "name": "Ann"}], [HELLO]),
        (
            [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}, HELLO],
            [{"role": "system", "content": [{"type": "text", "text": "A\nB"}]}, HELLO],
        ),
    ],
)
def test_messages_are_joined(messages: Any, same_as: Any, chat: Chat) -> None:
    assert _text(chat, messages) == _text(chat, same_as)


@pytest.mark.parametrize(
    ("messages", "param", "what"),
    [
        ([{"role": "user"}], "messages.0.content", "string or a list"),
        ([{"role": "user", "content": None}], "messages.0.content", "string or a list"),
        ([{"role": "user", "content": 7}], "messages.0.content", "string or a list"),
        ([{"role": "user", "content": {}}], "messages.0.content", "string or a list"),
        ([{"role": "user", "content": [7]}], "messages.0.content.0", "expected a part"),
        ([{"role": "user", "content": [TEXT, {"text": "x"}]}], "messages.0.content.1.type", "missing"),
        (
            [{"role": "user", "content": [{"type": "input_image", "image_url": URL}]}],
            "messages.0.content.0.type", "'input_image' is not known, expected 'text' or 'image_url'",
        ),
        ([{"role": "user", "content": [{"type": "A\nB"}]}], "messages.0.content.0.type", "not known"),
        ([{"role": "user", "content": [{"type": 3}]}], "messages.0.content.0.type", "not known"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text", "expected a string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages.0.content.0.image_url", "object with url"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"uri": URL}}]}],
            "messages.0.content.0.image_url", "object with url",
        ),
        ([{"role": "user", "content": [TEXT] * 65}], "messages.0.content", "at most 64 parts"),
        ([{"role": "tool", "content": "x"}], "messages.0.role", "'system', 'developer', 'user' or 'assistant'"),
        ([HELLO, {"role": "assistant", "content": "x"}], "messages", "the last message has to be the user's"),
        ([{"role": "assistant", "content": "x"}], "messages", "the last message has to be the user's"),
        ([HELLO, {"role": "system", "content": "x"}, HELLO], "messages", "before the other messages"),
        ([HELLO, {"role": "assistant", "content": [IMAGE]}, HELLO], "messages", "user messages only"),
        ([{"role": "system", "content": [IMAGE]}, HELLO], "messages", "user messages only"),
        ([], "messages", "at least 1"),
        ("Hello", "messages", "valid array"),
    ],
)  # fmt: skip
def test_errors_name_the_part_at_fault(messages: Any, param: str, what: str, chat: Chat) -> None:
    with pytest.raises(RequestRejectedError, match=what) as caught:
        _read(chat, messages)
    assert (caught.value.status, caught.value.param) == (400, param)


def _animation() -> bytes:
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("url", "what"),
    [
        (data_url(_animation()), "animation"),
        (data_url(b"%PDF-1.7\n"), "is a PDF document that was cut off"),
        (data_url(b"%PDF-1.7\n").replace("image/png", "application/pdf"), "is a PDF document that was cut off"),
        (data_url(b"none"), "Supported formats are PNG"),
        ("data:image/png;base64,A!", "not valid base64"),
        ("hello", "have to be data URLs"),
    ],
)
def test_images_are_refused_by_name(url: str, what: str, chat: Chat) -> None:
    with pytest.raises(RequestRejectedError, match=what):
        _read(chat, [{"role": "user", "content": [TEXT, {"type": "image_url", "image_url": url}]}])


def test_numbers_too_small_for_float32_spare_the_other_rows(app: FastAPI) -> None:
    for fields in ({"top_p": 1e-46, "temperature": 1.0}, {"temperature": 1e-46}, {"temperature": 5e-324}):
        body = json.dumps({"model": MODEL, "messages": [HELLO], "max_tokens": 2, "seed": 1, **fields}).encode()
        assert asyncio.run(call(app, body)).status == 200


def test_a_stop_of_a_million_texts_is_rejected_at_once(app: FastAPI) -> None:
    body = json.dumps({"model": MODEL, "messages": [HELLO], "stop": [""] * 1_000_000}).encode()
    answer = asyncio.run(call(app, body))
    assert answer.status == 400
    assert len(answer.message) < 400


def test_a_model_is_described_by_its_name(app: FastAPI) -> None:
    found = asyncio.run(call(app, b"", path=f"/v1/models/{MODEL}", method="GET"))
    assert (found.status, found.json["id"], found.json["object"]) == (200, MODEL, "model")
    missing = asyncio.run(call(app, b"", path="/v1/models/a/b", method="GET"))
    assert (missing.status, missing.json["error"]["code"]) == (404, "model_not_found")


def test_pages_of_named_origins_may_use_the_api(chat: Chat) -> None:
    app = create_app(chat.engine, name=MODEL, api_key="K", origins=["http://localhost:3000"])
    ask = [(b"access-control-request-method", b"POST"), (b"access-control-request-headers", b"authorization")]

    def preflight(origin: bytes) -> Any:
        return asyncio.run(call(app, b"", method="OPTIONS", headers=[(b"origin", origin), *ask]))

    allowed = preflight(b"http://localhost:3000")
    assert (allowed.status, allowed.headers["access-control-allow-origin"]) == (200, "http://localhost:3000")
    assert "access-control-allow-origin" not in preflight(b"http://evil.example").headers
    wrong_key = asyncio.run(call(app, b"{}", headers=[(b"origin", b"http://localhost:3000")]))
    assert wrong_key.status == 401
    assert wrong_key.headers["access-control-allow-origin"] == "http://localhost:3000"
    app.state.scheduler.close()


def test_host_names_that_are_accepted() -> None:
    assert "llm.example.com" not in (check_listen_address("127.0.0.1", None) or ())
    assert "llm.example.com" in (check_listen_address("127.0.0.1", None, ["LLM.example.com"]) or ())
    assert check_listen_address("127.0.0.1", "K") is None
