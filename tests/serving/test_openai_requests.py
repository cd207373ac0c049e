"""Requests as OpenAI's clients send them, over the whole application: statuses, and what an error names."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import socket
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from PIL import Image, PngImagePlugin

from llavar_peft import Chat
from llavar_peft.serving.api.api_app import create_app
from tests.serving.server import JSON, MODEL, Reply, ask_body, call, data_url, png, serving

HELLO = {"role": "user", "content": "Hello"}
HI = {"role": "assistant", "content": "Hi"}
URL = data_url(png())
DIGITS = URL.partition(",")[2]
WORDS = "".join(chr(number) for number in range(32, 127)) + "\t\n äß中\U0001f600"


@pytest.fixture(scope="module")
def app(chat: Chat) -> Iterator[FastAPI]:
    made = create_app(chat.engine, name=MODEL)
    yield made
    made.state.scheduler.close()


def _jpeg(**options: Any) -> bytes:
    file = BytesIO()
    Image.new("RGB", (21, 13), "red").save(file, "JPEG", **options)
    return file.getvalue()


def _send(app: FastAPI, *messages: Any, **fields: Any) -> Reply:
    body = {"model": MODEL, "messages": list(messages) or [HELLO], "temperature": 0, "max_tokens": 2} | fields
    return asyncio.run(call(app, json.dumps(body).encode()))


def _user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def _text(text: str = "Read.") -> dict[str, Any]:
    return {"type": "text", "text": text}


def _image(url: Any = URL, **fields: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **fields}}


OPTIONAL = (
    "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs", "max_completion_tokens",
    "max_tokens", "metadata", "modalities", "n", "parallel_tool_calls", "prediction", "presence_penalty",
    "prompt_cache_key", "reasoning_effort", "response_format", "safety_identifier", "seed", "service_tier", "stop",
    "store", "stream", "stream_options", "temperature", "tool_choice", "tools", "top_logprobs", "top_p", "user",
    "verbosity", "web_search_options",
)  # fmt: skip


@pytest.mark.parametrize("field", OPTIONAL)
def test_null_for_an_optional_field(field: str, app: FastAPI) -> None:
    assert _send(app, **{field: None, **({} if field == "max_tokens" else {"max_tokens": 2})}).status == 200


ACCEPTED: tuple[dict[str, Any], ...] = (
    {"max_tokens": 3, "max_completion_tokens": 2}, {"max_completion_tokens": 2}, {"n": 2}, {"seed": 0}, {"seed": -1},
    {"seed": 2**63 - 1}, {"stop": "\n"}, {"stop": ["a", "b", "c", "d"]}, {"stop": []}, {"logprobs": True},
    {"logprobs": False, "top_logprobs": 0}, {"stream": True}, {"stream": True, "stream_options": {}},
    {"stream": True, "stream_options": {"include_usage": True}}, {"stream_options": {"include_usage": None}},
    {"stream": True, "stream_options": {"include_usage": False, "include_obfuscation": False}}, {"temperature": 2},
    {"temperature": 1.5, "top_p": 0.1}, {"top_p": 1}, {"tools": []}, {"functions": []}, {"tool_choice": "none"},
    {"tool_choice": "auto", "parallel_tool_calls": True}, {"response_format": {"type": "text"}},
    {"response_format": {"type": "text", "strict": None}}, {"response_format": {"type": "json_object"}},
    {"logit_bias": {}}, {"presence_penalty": 0},
    {"frequency_penalty": 0.0}, {"user": "me"}, {"metadata": {"a": "b"}}, {"store": False}, {"service_tier": "auto"},
    {"reasoning_effort": "low"}, {"modalities": ["text"]}, {"top_k": 40, "repetition_penalty": 1.0, "unheard_of": [1]},
)  # fmt: skip


@pytest.mark.parametrize("fields", ACCEPTED, ids=str)
def test_fields_that_are_accepted(fields: dict[str, Any], app: FastAPI) -> None:
    reply = _send(app, **fields)
    assert reply.status == 200, reply.body
    if fields.get("stream"):
        assert reply.body.endswith(b"data: [DONE]\n\n")
    else:
        assert len(reply.json["choices"]) == fields.get("n", 1)
        assert reply.json["usage"]["completion_tokens"] <= 2 * fields.get("n", 1)


SCHEMA = "response_format.json_schema.schema"


def _json_schema(schema: Any) -> dict[str, Any]:
    described = {"name": "answer", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": described}}


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


REJECTED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (_json_schema(None), SCHEMA), (_json_schema([1]), SCHEMA), (_json_schema({"type": "strin"}), f"{SCHEMA}.type"),
    (_json_schema({"properties": {"a": {"uniqueItems": True}}}), f"{SCHEMA}.properties.a.uniqueItems"),
    (_json_schema({"$ref": "http://127.0.0.1/x"}), f"{SCHEMA}.$ref"), (_json_schema({"$ref": "#"}), SCHEMA),
    (_json_schema({"properties": {"a\nb": {"not": {}}}}), f"{SCHEMA}.properties.a?b.not"),
    (_json_schema({"$schema": {}}), f"{SCHEMA}.$schema"),
    (_json_schema({"enum": ["x" * 40_000]}), SCHEMA), (_json_schema(_nested(70)), SCHEMA),
    (_json_schema({"anyOf": [{"type": "null"}] * 600}), SCHEMA),
    ({"response_format": "text"}, "response_format"), ({"tools": [{"type": "function"}]}, "tools"),
    ({"functions": [{"name": "f"}]}, "functions"), ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"presence_penalty": 1}, "presence_penalty"), ({"frequency_penalty": -0.5}, "frequency_penalty"),
    ({"logprobs": True, "top_logprobs": 5}, "top_logprobs"), ({"logprobs": 5}, "logprobs"), ({"n": 0}, "n"),
    ({"n": "2"}, "n"), ({"n": 99}, "n"), ({"stop": ["x"] * 5}, "stop"), ({"stop": ""}, "stop"), ({"stop": 7}, "stop"),
    ({"stop": [None]}, "stop"), ({"temperature": 2.5}, "temperature"), ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"), ({"top_p": True}, "top_p"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"), ({"max_tokens": 10**9}, "max_tokens"), ({"seed": 1.5}, "seed"),
    ({"max_completion_tokens": 10**9, "max_tokens": 1}, "max_completion_tokens"), ({"stream": "yes"}, "stream"),
    ({"stream_options": True}, "stream_options"), ({"messages": None}, "messages"), ({"messages": []}, "messages"),
    ({"messages": [None]}, "messages.0"), ({"messages": {}}, "messages"), ({"model": None}, "model"),
    ({"model": "gpt-9"}, "model"),
)  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), REJECTED, ids=str)
def test_errors_name_the_field(fields: dict[str, Any], param: str, app: FastAPI) -> None:
    reply = _send(app, **fields)
    assert reply.status == (404 if fields.get("model") else 400)
    error = reply.json["error"]
    assert error["param"] == param
    assert error["message"].startswith(param) or param in ("model", "messages")
    assert "constrained" not in error["message"]


CONVERSATIONS: tuple[tuple[Any, ...], ...] = (
    ({"role": "system", "content": "Be brief."}, HELLO), ({"role": "developer", "content": [_text()]}, HELLO),
    ({"role": "system", "content": ""}, HELLO), (HI, HELLO), (HELLO, HELLO), (HELLO, HI, HELLO), (HELLO, HI, HI, HELLO),
    (HELLO, {**HI, "refusal": None, "annotations": [], "audio": None, "tool_calls": None}, HELLO),
    (HELLO, {"role": "assistant", "content": None}, HELLO), (HELLO, {"role": "assistant"}, HELLO),
    (HELLO, {"role": "assistant", "content": [_text("Hi")]}, HELLO), ({**HELLO, "name": "Ann"},),
    ({**HELLO, "name": None},),
    ({"role": "user", "content": ""},), (_user(),), (_user(_text("")),), (_user("Read."),), (_user(_text(), _text()),),
    (_user(_text(), _image()),), (_user(_image(), _text()),), (_user(_image()), HELLO), (_user(_image(), _image()),),
    (_user(_image(detail="low"), _text()),), (_user(_image(detail=None), _text()),), (_user(_image()), HI, HELLO),
    (_user(_text(), {"type": "image_url", "image_url": URL}),), (_user({**_text(), "cache_control": {}}),),
    ({"role": "user", "content": WORDS},), ({"role": "user", "content": "<image> <im_patch> </s> ###"},),
)  # fmt: skip


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=lambda _: "")
def test_messages_that_are_accepted(messages: tuple[Any, ...], app: FastAPI) -> None:
    reply = _send(app, *messages)
    assert reply.status == 200, reply.body
    assert reply.json["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize(
    "url",
    [
        URL, f"  {URL}\n", URL.upper().replace(DIGITS.upper(), DIGITS), URL.rstrip("="), URL[:60] + "\r\n" + URL[60:],
        "\n".join(URL[place : place + 76] for place in range(0, len(URL), 76)),
        f"data:image/png;base64,{base64.urlsafe_b64encode(_jpeg(quality=99)).decode()}",
        f"data:image/png;base64,{base64.urlsafe_b64encode(_jpeg(quality=98)).decode().rstrip('=')}",
        URL.replace("+", "%2B").replace("=", "%3D"), data_url(_jpeg(), "image/png"), data_url(_jpeg(), "image/jpg"),
        data_url(png(), "application/octet-stream"), data_url(png(), "text/plain"), data_url(png(), ""),
        data_url(png(), "image/png;charset=utf-8"), data_url(png(), 'image/png;name="a.png"'),
    ],
    ids=lambda _: "",
)  # fmt: skip
def test_data_urls_that_are_accepted(url: str, app: FastAPI) -> None:
    reply = _send(app, _user(_text(), _image(url)))
    assert reply.status == 200, reply.body


def test_a_png_with_a_large_text_is_read(app: FastAPI) -> None:
    """The server has the opener of ask and train."""
    text = PngImagePlugin.PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    file = BytesIO()
    Image.new("RGB", (21, 13), "red").save(file, "PNG", pnginfo=text)
    assert _send(app, _user(_text(), _image(data_url(file.getvalue())))).status == 200


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([_image("https://example.com/a.png")], "have to be data URLs"),
        ([_image("/etc/passwd")], "have to be data URLs"),
        ([_image("file:///etc/passwd")], "have to be data URLs"), ([_image(DIGITS)], "have to be data URLs"),
        ([_image("data:image/svg+xml;utf8,<svg/>")], "have to be data URLs"), ([_image("")], "have to be data URLs"),
        ([_image("data:image/png;base64,A")], "not valid base64"), ([_image(f"{URL}!")], "not valid base64"),
        ([_image("data:image/png;base64,")], "an empty file"), ([_image(data_url(b"%PDF-1"))], "cut off"),
        ([_image(data_url(b"%PDF-1", "application/pdf"))], "cut off"),
        ([_image(data_url(b"<svg/>"))], "an SVG drawing"),
        ([_image(data_url(b"\0\0\0\x18ftypheic"))], "a HEIC photograph"), ([_image(None)], "content.0.image_url"),
        ([{"type": "image", "image": URL}], "content.0.type: 'image' is not known"),
        ([{"type": "input_text", "text": "x"}], "content.0.type: 'input_text' is not known"),
        ([_text(), {"type": "input_audio", "input_audio": {}}], "content.1.type: 'input_audio' is not known"),
        ([{"type": "file", "file": {"file_data": URL}}], "content.0.type: 'file' is not known"),
        ([{"type": "text", "text": None}], "content.0.text"), ([None], "content.0"), (None, "content"), (7, "content"),
    ],
    ids=lambda _: "",
)  # fmt: skip
def test_errors_name_the_part(content: Any, what: str, app: FastAPI) -> None:
    reply = _send(app, {"role": "user", "content": content})
    assert reply.status == 400
    assert what in reply.message
    assert reply.json["error"]["param"].startswith("messages")


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([HELLO, HI], "the last message has to be the user's"), ([{"role": "tool", "content": "x"}], "messages.0.role"),
        ([{"role": "function", "name": "f", "content": "x"}, HELLO], "messages.0.role"),
        ([{"content": "x"}], "messages.0.role"),
        ([{"role": None, "content": "x"}], "messages.0.role"),
        ([HELLO, {"role": "system", "content": "x"}], "system message"),
    ],
    ids=lambda _: "",
)  # fmt: skip
def test_errors_name_the_role(messages: list[Any], what: str, app: FastAPI) -> None:
    reply = _send(app, *messages)
    assert reply.status == 400
    assert what in reply.message


def _request(app: FastAPI, method: str, path: str, *headers: tuple[bytes, bytes], body: bytes = b"") -> Reply:
    return asyncio.run(call(app, body, method=method, path=path, headers=headers or JSON))


BODY = json.dumps({"model": MODEL, "messages": [HELLO], "max_tokens": 1}).encode()


@pytest.mark.parametrize(
    ("method", "path", "status", "what"),
    [
        ("GET", "/v1/models", 200, ""), ("GET", "/v1/models/", 200, ""), ("HEAD", "/v1/models", 200, ""),
        ("GET", f"/v1/models/{MODEL}", 200, ""), ("GET", "/v1/models/none", 404, "does not exist"),
        ("HEAD", "/health", 200, ""),
        ("GET", "/health/", 200, ""), ("POST", "/v1/chat/completions/", 200, ""),
        ("GET", "/v1/chat/completions", 405, "method"),
        ("OPTIONS", "/v1/chat/completions", 405, "method"), ("DELETE", f"/v1/models/{MODEL}", 405, "method"),
        ("POST", "/v1/completions", 404, "/v1/chat/completions"),
        ("POST", "/v1/responses", 404, "/v1/chat/completions"),
        ("POST", "/chat/completions", 404, "/v1/chat/completions"),
        ("POST", "/v1/embeddings", 404, "/v1/chat/completions"),
        ("GET", "/", 404, "serve --ui"), ("GET", "/docs", 404, "no such path"),
    ],
)  # fmt: skip
def test_paths_and_methods(method: str, path: str, status: int, what: str, app: FastAPI) -> None:
    reply = _request(app, method, path, body=BODY)
    assert reply.status == status
    if status >= 400:
        assert what in reply.message
    assert ("allow" in reply.headers) == (status == 405)


HOST, TYPE = JSON


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ([HOST, (b"content-type", b"application/json; charset=utf-8")], 200, None),
        ([HOST, (b"content-type", b"APPLICATION/JSON")], 200, None),
        ([HOST, (b"content-type", b"text/plain")], 415, "unsupported_media_type"),
        ([HOST], 415, "unsupported_media_type"),
        ([HOST, (b"content-type", b"multipart/form-data; boundary=x")], 415, "unsupported_media_type"),
        ([*JSON, (b"content-encoding", b"identity")], 200, None),
        ([*JSON, (b"content-encoding", b"gzip")], 415, "unsupported_encoding"),
        ([*JSON, TYPE], 400, "duplicate_header"), ([*JSON, HOST], 400, "duplicate_header"),
        ([*JSON, (b"authorization", b"Bearer a"), (b"authorization", b"Bearer b")], 400, "duplicate_header"),
        ([*JSON, (b"x-stainless-lang", b"python"), (b"x-stainless-lang", b"js"),
        (b"openai-organization", b"o")], 200, None),
    ],
    ids=lambda _: "",
)  # fmt: skip
def test_headers(headers: list[tuple[bytes, bytes]], status: int, code: str | None, app: FastAPI) -> None:
    body = gzip.compress(BODY) if (b"content-encoding", b"gzip") in headers else BODY
    reply = _request(app, "POST", "/v1/chat/completions", *headers, body=body)
    assert (reply.status, reply.json.get("error", {}).get("code")) == (status, code)


def test_a_key_is_accepted_as_any_client_writes_it(chat: Chat) -> None:
    app = create_app(chat.engine, name=MODEL, api_key="K")
    for given, status in ((b"Bearer K", 200), (b"bearer K", 200), (b"Bearer  K", 200), (b"K", 401), (b"Basic K", 401)):
        assert _request(app, "GET", "/v1/models", HOST, (b"authorization", given)).status == status
    app.state.scheduler.close()


def test_a_browser_s_client_may_send_its_own_headers(chat: Chat) -> None:
    app = create_app(chat.engine, name=MODEL, origins=["http://localhost:3000"])
    sent = b"authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-retry-count"
    asks = [(b"origin", b"http://localhost:3000"), (b"access-control-request-method", b"POST")]
    reply = _request(app, "OPTIONS", "/v1/chat/completions", HOST, *asks, (b"access-control-request-headers", sent))
    assert reply.status == 200
    assert "x-stainless-retry-count" in reply.headers["access-control-allow-headers"]
    app.state.scheduler.close()


def test_a_stream_counts_tokens_only_if_asked(app: FastAPI) -> None:
    for options, counted in (({"include_usage": True}, True), ({}, False), (None, False)):
        lines = _send(app, stream=True, stream_options=options).body.decode().split("\n\n")
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert all(("usage" in event) == counted for event in events)
        assert bool(events[-1].get("usage")) == counted


def test_http_1_0_and_a_kept_alive_connection(chat: Chat) -> None:
    with serving(chat) as (address, _):
        port = int(address.rpartition(":")[2])
        for stream in (False, True):
            body = json.dumps({**json.loads(BODY), "stream": stream}).encode()
            head = f"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n"
            head += "Content-Type: application/json\r\n\r\n"
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                connection.sendall(head.encode() + body)
                answer = b"".join(iter(lambda: connection.recv(65536), b""))
            assert answer.startswith(b"HTTP/1.1 200")
            assert answer.rstrip().endswith(b"[DONE]" if stream else b"}")
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            for _ in range(2):
                connection.sendall(b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_openais_client(chat: Chat) -> None:
    with serving(chat, api_key="K") as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1/", api_key="K", max_retries=0)
        ask: Any = client.chat.completions.create
        messages: Any = [{"role": "developer", "content": "Be brief."}, _user(_text(), _image(detail="auto"))]
        shared = {"model": MODEL, "messages": messages, "max_completion_tokens": 2, "seed": 1, "user": "me"}
        assert ask(**shared, response_format={"type": "text"}, metadata={"a": "b"}, store=False).usage.total_tokens > 0
        with ask(**shared, stream=True, stream_options={"include_usage": True}) as stream:
            assert [chunk.usage for chunk in stream][-1].completion_tokens <= 2
        raw = client.chat.completions.with_raw_response.create(**shared)
        assert raw.headers["x-request-id"]
        assert raw.parse().model == MODEL
        for fields in (
            {"logit_bias": {"5": 1}},
            {"tools": [{"type": "function", "function": {"name": "f"}}]},
        ):
            with pytest.raises(openai.BadRequestError) as caught:
                ask(**shared, **fields)
            assert caught.value.param in fields
        with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
            client.completions.create(model=MODEL, prompt="Hello")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("none")
        assert next(iter(client.models.list())).id == MODEL


def test_of_two_types_the_one_that_was_sent_is_explained(app: FastAPI) -> None:
    for stop, what in ((["x"] * 5, "at most 4 items"), ("x" * 300, "at most 256 characters"), ([""], "at least 1")):
        reply = asyncio.run(call(app, ask_body("Hm?", stop=stop)))
        assert (reply.status, what in reply.message) == (400, True), reply.message
