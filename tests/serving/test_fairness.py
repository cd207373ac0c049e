"""Slow and greedy clients, and the end of the server: what others notice of it."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from llavar_peft import Chat
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.token_sampling import Sampling
from llavar_peft.serving import run_server
from llavar_peft.serving.api import chat_messages
from llavar_peft.serving.api.api_app import create_app
from llavar_peft.serving.api.request_limits import BodyBudget, RequestLimits
from llavar_peft.serving.api.scheduler import BusyError, Job, Scheduler
from llavar_peft.serving.run_server import bind_socket, check_listen_address, check_origins, make_server
from llavar_peft.serving.ui.page_guard import PageGuard
from tests.serving.server import JSON, MODEL, Reply, ask_body, call

GRACE = 60.0
"""Seconds, of the clock that the tests move, in which a body may be slow."""


@pytest.fixture
def app(chat: Chat) -> Iterator[FastAPI]:
    made = create_app(chat.engine, name=MODEL, limits=RequestLimits(body_seconds=600, body_grace_seconds=GRACE))
    yield made
    made.state.scheduler.close()


def test_slow_bodies_keep_no_one_out(app: FastAPI, pass_time: Callable[[float], None]) -> None:
    """Eighty of them once held every place for half a minute."""
    arriving: set[int] = set()

    def body(number: int) -> Iterator[bytes]:
        while True:
            yield b" "
            arriving.add(number)

    async def crowd() -> tuple[list[Reply], Reply]:
        slow = [asyncio.create_task(call(app, body(number), pause=0.1)) for number in range(100)]
        while len(arriving) < len(slow):
            await asyncio.sleep(0.01)
        answered = await call(app, ask_body("Hm?"))
        assert not any(one.done() for one in slow)
        pass_time(GRACE + 1)
        return await asyncio.gather(*slow), answered

    slow, answered = asyncio.run(crowd())
    assert answered.status == 200
    assert {reply.status for reply in slow} == {408}


def test_a_body_that_arrives_at_a_reasonable_speed_has_more_time(
    chat: Chat, pass_time: Callable[[float], None]
) -> None:
    limits = RequestLimits(body_seconds=600, body_grace_seconds=GRACE, body_rate=1000)
    app = create_app(chat.engine, name=MODEL, limits=limits)

    def body() -> Iterator[bytes]:
        yield ask_body("Hm?") + b" " * 60_000
        for _ in range(3):
            pass_time(GRACE / 2)
            yield b" "

    assert asyncio.run(call(app, body(), pause=0.01)).status == 200
    app.state.scheduler.close()


def test_bodies_share_a_budget_of_memory(chat: Chat) -> None:
    app = create_app(chat.engine, name=MODEL, limits=RequestLimits(all_bodies_bytes=100_000))
    given: list[int] = []

    def body(number: int) -> Iterator[bytes]:
        for _ in range(8):
            given.append(number)
            yield b" " * 10_000

    async def crowd() -> list[Reply]:
        return await asyncio.gather(*(call(app, body(number), pause=0.01) for number in range(5)))

    replies = asyncio.run(crowd())
    assert 429 in {reply.status for reply in replies}
    assert asyncio.run(call(app, ask_body("Hm?"))).status == 200  # nothing stays reserved
    app.state.scheduler.close()


def test_the_page_s_bodies_count_in_the_same_budget() -> None:
    budget, held = BodyBudget(1_000_000), []

    async def page(scope: Any, receive: Any, send: Any) -> None:
        held.append(budget.reserve(500_000))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    guard: Any = PageGuard(page, prefix="/ui", files=Path("/srv/page"), api_key=None, budget=budget)
    scope = {"state": {"request_id": "1"}}

    async def with_state(inner: Any, receive: Any, send: Any) -> None:
        await guard({**inner, **scope}, receive, send)

    path = "/ui/gradio_api/upload"
    assert asyncio.run(call(with_state, b"x" * 600_000, path=path, headers=JSON)).status == 200
    assert held == [False]
    assert asyncio.run(call(with_state, b"x" * 1_100_000, path=path, headers=JSON)).status == 429
    too_long = asyncio.run(call(with_state, b" " * 1_100_000, path="/ui/gradio_api/queue/join", headers=JSON))
    assert too_long.status == 413


def test_a_text_that_cannot_fit_is_not_tokenized(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of 19 MB took a minute in the threads that read everybody's requests."""
    longest: list[int] = []
    original = chat_messages.encode_messages

    def watched(processor: Any, messages: Any, *rest: Any, **more: Any) -> Any:
        messages = list(messages)
        longest.append(sum(len(part or "") for _, parts in messages for part in parts))
        return original(processor, messages, *rest, **more)

    monkeypatch.setattr(chat_messages, "encode_messages", watched)
    parts = [{"type": "text", "text": "word " * 70_000}] * 50
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": parts}]}).encode()
    assert len(body) > 15_000_000
    reply = asyncio.run(call(app, body))
    assert (reply.status, reply.json["error"]["code"]) == (400, "context_length_exceeded")
    assert longest == []
    assert asyncio.run(call(app, ask_body("Hm?"))).status == 200
    assert longest


class _Turns:
    """A scheduler whose decoding waits, with the order in which jobs are taken."""

    def __init__(self, engine: Engine, *, rows: int, waiting: int) -> None:
        self.scheduler = Scheduler(engine, rows=rows, waiting=waiting)
        self.engine = engine
        self.ended: list[str] = []
        self.done = threading.Semaphore(0)

    def job(self, chat: Chat, name: str) -> Job:
        def listen(event: Any) -> None:
            if not isinstance(event, str):
                self.ended.append(name if not isinstance(event, Exception) else type(event).__name__)
                self.done.release()

        request = chat.request(None, "Hm?", adapter=None, sampling=Sampling(max_new_tokens=2, temperature=0.0))
        return Job(request, self.engine, listen, client=name[0])


def test_clients_take_turns(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    proceed, compute = threading.Event(), chat.engine.compute_features
    monkeypatch.setattr(chat.engine, "compute_features", lambda *args: (proceed.wait(60), compute(*args)))
    turns = _Turns(chat.engine, rows=1, waiting=8)
    turns.scheduler.submit([turns.job(chat, "a0")])
    while not turns.scheduler.running:
        threading.Event().wait(0.01)
    turns.scheduler.submit([turns.job(chat, f"a{number}") for number in range(1, 8)])
    turns.scheduler.submit([turns.job(chat, "b0")])
    with pytest.raises(BusyError):
        turns.scheduler.submit([turns.job(chat, "a8")])
    assert turns.scheduler.is_full("a")
    assert not turns.scheduler.is_full("c")
    turns.scheduler.submit([turns.job(chat, "c0")])  # room that a client with answers in the queue does not get
    proceed.set()
    for _ in range(10):
        assert turns.done.acquire(timeout=60)
    turns.scheduler.close()
    assert turns.ended == ["a0", "b0", "c0", *(f"a{number}" for number in range(1, 8))]


@pytest.mark.usefixtures("endless", "slow")
def test_answers_that_outlive_the_server_end_with_an_error(chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(chat.engine, name=MODEL)
    bound = bind_socket("127.0.0.1", 0)
    server = make_server(app, shutdown_seconds=0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    url, found = f"http://127.0.0.1:{bound.getsockname()[1]}/v1/chat/completions", {}

    def ask(stream: bool) -> None:
        body = ask_body("Go on.", max_tokens=1500, stream=stream)
        reply = httpx.post(url, content=body, headers={"content-type": "application/json"}, timeout=60)
        found[stream] = (reply.status_code, reply.text)

    clients = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
    for client in clients:
        client.start()
    while app.state.scheduler.running < 2:
        threading.Event().wait(0.02)
    server.should_exit = True
    for one in (*clients, thread):
        one.join(60)
    assert found[False][0] == 503
    assert json.loads(found[False][1])["error"]["code"] == "shutting_down"
    assert found[True][0] == 200
    assert (
        json.loads(found[True][1].strip().split("\n\n")[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
    )
    assert "Traceback" not in caplog.text


def test_a_request_that_is_still_read_gets_an_error_too(chat: Chat) -> None:
    """The server ends while a body arrives; the time limits of bodies are far away."""
    app = create_app(chat.engine, name=MODEL, limits=RequestLimits(body_seconds=600, body_grace_seconds=600))
    arriving = asyncio.Event()

    def body() -> Iterator[bytes]:
        yield from [b" "] * 3
        arriving.set()
        yield from itertools.repeat(b" ")

    async def cancel() -> Reply:
        task = asyncio.create_task(call(app, body(), pause=0.01))
        await asyncio.wait_for(arriving.wait(), 60)
        task.cancel()
        return await task

    reply = asyncio.run(cancel())
    assert (reply.status, reply.json["error"]["code"]) == (503, "shutting_down")
    app.state.scheduler.close()


def test_a_stopped_scheduler_takes_no_requests(app: FastAPI) -> None:
    app.state.scheduler.close()
    assert asyncio.run(call(app, ask_body("Hm?"))).status == 503


def test_answers_are_sent_without_delay() -> None:
    """With a socket of protocol 0, asyncio leaves Nagle's algorithm on."""
    with bind_socket("127.0.0.1", 0) as bound:
        assert bound.proto == socket.IPPROTO_TCP


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (socket.gaierror(-2, "Name or service not known"), "'nowhere' is not an address of this machine (Name"),
        (UnicodeError("label too long"), "'nowhere' is not an address of this machine (it is not a host name)"),
    ],
)
def test_a_bad_host_does_not_blame_the_port(error: Exception, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(run_server.socket, "getaddrinfo", fails)
    with pytest.raises(ValueError, match="--host") as caught:
        bind_socket("nowhere", 8000)
    assert what in str(caught.value)
    assert "--port" not in str(caught.value)


def test_an_address_of_another_machine_is_no_host() -> None:
    with pytest.raises(ValueError, match=r"--host: '192\.0\.2\.1' is not an address of this machine"):
        bind_socket("192.0.2.1", 0)


def test_names_and_origins_as_people_write_them() -> None:
    hosts = check_listen_address("127.0.0.1", None, ["LLM.example.com:8443", "[fd00::1]:80", "fd00::2", "plain"]) or ()
    assert {"llm.example.com", "[fd00::1]", "[fd00::2]", "plain"} <= set(hosts)
    for wrong in ("https://llm.example.com", "a/b", "*.example.com", ""):
        with pytest.raises(ValueError, match="--allow-host: is not a host name"):
            check_listen_address("127.0.0.1", None, [wrong])
    assert check_origins(["http://localhost:3000/", "HTTPS://App.example", "*"]) == [
        "http://localhost:3000", "https://app.example", "*",
    ]  # fmt: skip
    for wrong in ("localhost:3000", "app.example", "http://a/b"):
        with pytest.raises(ValueError, match="--allow-origin: is not an origin"):
            check_origins([wrong])
