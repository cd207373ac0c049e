"""The official OpenAI client against a running server."""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from fastapi import FastAPI

from llavar_peft import Chat, cli
from llavar_peft.serving.api.api_app import create_app
from llavar_peft.serving.api.request_limits import RequestLimits
from llavar_peft.serving.run_server import bind_socket, listen
from tests.serving.server import JSON, MODEL, Reply, ask_body, call, data_url, png, serving

GREEDY = {"temperature": 0.0, "max_tokens": 12}


@pytest.fixture(scope="module")
def server(chat: Chat) -> Iterator[tuple[str, FastAPI]]:
    with serving(chat) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: tuple[str, FastAPI]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0)


def _messages(text: str, *images: Path) -> list[Any]:
    shown = [{"type": "image_url", "image_url": {"url": data_url(image.read_bytes())}} for image in images]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


@pytest.mark.slow
def test_answers_are_those_of_asking_directly(chat: Chat, client: openai.OpenAI, images: list[Path]) -> None:
    for image in images:
        for model, adapter in ((MODEL, None), ("one", "one"), ("two", "two")):
            direct = chat.request(image, "What does it say?", adapter=adapter)
            expected = chat.ask(image, "What does it say?", adapter=adapter, temperature=0.0, max_new_tokens=12)
            done = client.chat.completions.create(model=model, messages=_messages("What does it say?", image), **GREEDY)
            assert done.choices[0].message.content == expected
            assert done.choices[0].finish_reason in ("stop", "length")
            assert done.usage is not None
            assert done.usage.prompt_tokens == len(direct.ids)
            assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens


@pytest.mark.slow
def test_concurrent_clients_get_the_answers_of_single_ones(client: openai.OpenAI, images: list[Path]) -> None:
    asked = [
        (model, f"Read {word}.", image)
        for model in (MODEL, "one")
        for word in ("it", "the sign", "all")
        for image in images
    ]

    def ask(what: tuple[str, str, Path]) -> str | None:
        model, text, image = what
        done = client.chat.completions.create(model=model, messages=_messages(text, image), **GREEDY)
        return done.choices[0].message.content

    alone = [ask(what) for what in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(ask, asked)) == alone


def test_streaming(client: openai.OpenAI, images: list[Path]) -> None:
    messages = _messages("Read.", images[0])
    whole = client.chat.completions.create(model=MODEL, messages=messages, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=messages, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert [reason for reason in reasons if reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_conversation_has_several_turns(chat: Chat, client: openai.OpenAI, images: list[Path]) -> None:
    talk = chat.conversation(images[0], adapter=None)
    first = talk.send("Read.", temperature=0.0, max_new_tokens=12)
    second = talk.send("Again?", temperature=0.0, max_new_tokens=12)
    messages = [
        *_messages("Read.", images[0]),
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Again?"},
    ]
    done = client.chat.completions.create(model=MODEL, messages=messages, **GREEDY)
    assert done.choices[0].message.content == second


def test_the_example_holds_a_conversation(
    server: tuple[str, FastAPI],
    chat: Chat,
    images: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example = Path(__file__).parents[2] / "examples/openai_client.py"
    asked = [str(images[0]), "Read.", "Again?", "--model", "one", "--temperature", "0", "--max-tokens", "24"]
    monkeypatch.setattr(sys, "argv", [example.name, *asked, "--url", f"{server[0]}/v1"])
    runpy.run_path(str(example), run_name="__main__")
    talk = chat.conversation(images[0], adapter="one")
    answers = [talk.send(text, temperature=0.0, max_new_tokens=24) for text in ("Read.", "Again?")]
    assert capsys.readouterr().out == "".join(f"{one}\n" for one in answers)


def test_seeds_stops_choices_and_logprobs(client: openai.OpenAI, images: list[Path]) -> None:
    messages: Any = _messages("Tell.", images[0])

    def drawn(**settings: Any) -> list[str | None]:
        done = client.chat.completions.create(
            model=MODEL, messages=messages, temperature=2.0, max_tokens=12, **settings
        )
        return [choice.message.content for choice in done.choices]

    assert drawn(seed=7) == drawn(seed=7)
    several = drawn(seed=7, n=3)
    assert len(set(several)) > 1
    assert several[0] == drawn(seed=7)[0]
    text = several[0] or ""
    cut = text[len(text) // 2]
    assert drawn(seed=7, stop=[cut])[0] == text.split(cut)[0].rstrip()

    done = client.chat.completions.create(model=MODEL, messages=messages, logprobs=True, **GREEDY)
    assert done.choices[0].logprobs is not None
    content = done.choices[0].logprobs.content or []
    assert done.usage is not None
    assert 0 < len(content) <= done.usage.completion_tokens
    assert b"".join(bytes(one.bytes or ()) for one in content).decode() == done.choices[0].message.content
    assert all(one.logprob <= 0 for one in content)


def test_models_health_and_metrics(server: tuple[str, FastAPI], client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL, "one", "two"]

    def get(path: str) -> str:
        with urllib.request.urlopen(server[0] + path, timeout=10) as answer:
            return str(answer.read().decode())

    assert json.loads(get("/health")) == {"status": "ok"}
    client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hm?"}], **GREEDY)
    counts = get("/metrics")
    assert 'llavar_requests_total{path="/v1/chat/completions",status="200"}' in counts
    assert 'llavar_answers{state="running"} 0' in counts


def test_unsupported_requests_give_openais_errors(client: openai.OpenAI) -> None:
    hello: list[Any] = [{"role": "user", "content": "Hello"}]
    with pytest.raises(openai.NotFoundError, match="model does not exist"):
        client.chat.completions.create(model="gpt-9", messages=hello)
    tool: Any = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(model=MODEL, messages=hello, tools=[tool])
    with pytest.raises(openai.BadRequestError, match="longer than the model's context"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "long " * 5000}])
    with pytest.raises(openai.BadRequestError, match="the last message has to be the user's"):
        client.chat.completions.create(model=MODEL, messages=[*hello, {"role": "assistant", "content": "Hi"}])
    assert client.models.retrieve(MODEL).id == MODEL
    extra = client.chat.completions.create(
        model=MODEL, messages=hello, user="me", extra_body={"unheard_of": 1}, **GREEDY
    )
    assert extra.choices


def _until(what: Any) -> None:
    deadline = time.monotonic() + 100
    while not what() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert what()


@pytest.mark.usefixtures("endless", "slow")
@pytest.mark.parametrize("stream", [True, False])
def test_disconnecting_cancels_the_answers(stream: bool, chat: Chat) -> None:
    with serving(chat) as (address, app):
        service, port = app.state.scheduler, int(address.rpartition(":")[2])
        body = ask_body("Go on.", max_tokens=1500, n=8, stream=stream)
        with socket.create_connection(("127.0.0.1", port)) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            _until(lambda: service.running > 0)
        # The complete answers would take more than two minutes.
        _until(lambda: service.running == service.waiting == 0)


def test_a_full_queue_rejects_requests(chat: Chat) -> None:
    limits = RequestLimits(rows=1, waiting=2)
    with serving(chat, limits=limits) as (address, app):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        hello: list[Any] = [{"role": "user", "content": "Hello"}]
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model=MODEL, messages=hello, n=3)
        assert refused.value.response.headers["retry-after"] == "5"
        # No part of the rejected request is left.
        assert app.state.scheduler.waiting == 0
        assert client.chat.completions.create(model=MODEL, messages=hello, n=2, **GREEDY).choices


def test_the_queue_takes_64_answers(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    proceed, compute = threading.Event(), chat.engine.compute_features
    monkeypatch.setattr(chat.engine, "compute_features", lambda *args: (proceed.wait(600), compute(*args)))
    app = create_app(chat.engine, name=MODEL)
    service = app.state.scheduler

    async def ask_all() -> list[Reply]:
        running = asyncio.create_task(call(app, ask_body("Go on.")))
        while not service.running:
            await asyncio.sleep(0.01)
        waiting = [asyncio.create_task(call(app, ask_body("Go on.", n=8))) for _ in range(8)]
        while service.waiting < 64:
            await asyncio.sleep(0.01)
        refused = await call(app, ask_body("Hello"))
        proceed.set()
        return [refused, *await asyncio.gather(running, *waiting)]

    replies = asyncio.run(asyncio.wait_for(ask_all(), 600))
    service.close()
    assert [reply.status for reply in replies] == [429, *[200] * 9]
    assert replies[0].headers["retry-after"] == "5"


def test_an_answer_that_takes_too_long_ends(chat: Chat) -> None:
    with serving(chat, limits=RequestLimits(seconds=0.0)) as (address, app):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.APIStatusError) as late:
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hello"}])
        assert late.value.status_code == 504
        _until(lambda: app.state.scheduler.running == 0)


def test_a_failing_batch_does_not_affect_others(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "/home/somebody/secret"
    whole = chat.engine.compute_features

    def breaks(images: Any, adapter: str | None) -> None:
        if adapter == "two":
            raise RuntimeError(f"CUDA error at {secret}")
        whole(images, adapter)

    monkeypatch.setattr(chat.engine, "compute_features", breaks)
    with serving(chat) as (address, app):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        hello: list[Any] = [{"role": "user", "content": "Hello"}]
        with pytest.raises(openai.InternalServerError) as broken:
            client.chat.completions.create(model="two", messages=hello, **GREEDY)
        assert secret not in str(broken.value)
        assert broken.value.response.headers["x-request-id"] in str(broken.value)
        assert secret in caplog.text
        assert client.chat.completions.create(model="one", messages=hello, **GREEDY).choices
        assert app.state.scheduler.running == 0


def test_the_key_is_required(chat: Chat) -> None:
    with serving(chat, api_key="sesame") as (address, _):
        hello: list[Any] = [{"role": "user", "content": "Hello"}]
        right = openai.OpenAI(base_url=f"{address}/v1", api_key="sesame", max_retries=0)
        assert right.chat.completions.create(model=MODEL, messages=hello, **GREEDY).choices
        for wrong in ("sesam", "sesame!", "SESAME"):
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=f"{address}/v1", api_key=wrong, max_retries=0).models.list()
        with urllib.request.urlopen(f"{address}/health", timeout=10) as answer:
            assert answer.status == 200


def test_stopping_the_server_ends_its_thread(chat: Chat) -> None:
    with serving(chat) as (_, app):
        service = app.state.scheduler
    assert not service._thread.is_alive()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "::", "127.example.net"])
def test_a_public_address_requires_a_key(host: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--model", str(checkpoint), "--host", host]) == 2
    assert "there is no API key" in capsys.readouterr().err


@pytest.mark.parametrize("loading", [False, True])
def test_a_port_in_use_is_reported(loading: bool, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also the port of a server that does not listen yet, because it loads its model."""
    with bind_socket("127.0.0.1", 0) as taken:
        if not loading:
            listen(taken)
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--model", str(checkpoint), "--port", str(port)]) == 3
    assert (
        f"127.0.0.1:{port}: the server cannot listen at this port (Address already in use)" in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_stops_on_a_signal(number: signal.Signals, checkpoint: Path) -> None:
    command = [sys.executable, "-m", "llavar_peft", "serve", "--model", str(checkpoint), "--port", "0", "--name", "m"]
    process = subprocess.Popen([*command, "--quantize", "nf4"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    threading.Timer(600, process.kill).start()
    line = process.stdout.readline().decode()
    address = line.split()[1]
    client = openai.OpenAI(base_url=address, api_key="any")
    done = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "Hm?"}], **GREEDY)
    assert done.choices[0].finish_reason
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert b"Traceback" not in err


def test_an_image_is_encoded_once(chat: Chat) -> None:
    from llavar_peft.serving.api.request_images import RequestImageReader

    reader = RequestImageReader(chat.engine.processor, RequestLimits())
    url = data_url(png())
    assert reader.open([url])[0][0] is reader.open([url])[0][0]
    assert reader.open([url])[0][0] is not reader.open([data_url(png(colour="blue"))])[0][0]


def test_a_body_may_arrive_in_parts(chat: Chat) -> None:
    from llavar_peft.serving.api.api_app import create_app

    app = create_app(chat.engine, name=MODEL)
    body = ask_body("Hello")

    async def both() -> list[Any]:
        parts = [body[place : place + 7] for place in range(0, len(body), 7)]
        return [await call(app, body, headers=JSON), await call(app, parts, headers=JSON)]

    one, other = asyncio.run(both())
    assert one.status == other.status == 200
    assert one.json["choices"] == other.json["choices"]
    app.state.scheduler.close()
