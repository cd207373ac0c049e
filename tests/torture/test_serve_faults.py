"""``serve`` under faults of the machine: it says what happened, and the next one serves at the same port."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import torch

from llavar_peft import ModelConfig, build_model
from llavar_peft.inference.batch_decoder import DecodingBatch
from tests.torture.faulty_process import (
    Ended,
    Fault,
    Running,
    full_disk,
    no_fault,
    obey_permissions,
    signal_at,
    use_temporary,
)
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER

pytestmark = [
    pytest.mark.slow,
    pytest.mark.torture,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes"),
]

ENVIRONMENT, INTERRUPTED = 3, 130
LOADING = 4  # the file of the checkpoint whose opening is "while the model is loading"
_EVERY = os.environ.get("LLAVAR_TORTURE_MATRIX") == "all"


def each(position: int, *faults: Any) -> list[Any]:
    """Return the faults to test: all of them in `make torture`, otherwise every fourth, and one in each test.

    Args:
        position: Number of faults in the tests before this one.
        faults: The arguments of each fault.
    """
    return [one for number, one in enumerate(faults, start=position) if _EVERY or number % 4 == 1] or [faults[0]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers end only at their limit."""
    folder = tmp_path_factory.mktemp("served")
    parts = ModelConfig(language_model=str(LANGUAGE_MODEL), vision_tower=str(VISION_TOWER), dtype="float32")
    model, processor = build_model(parts, seed=1)
    letters = processor.tokenizer.convert_tokens_to_ids(["A", "B"])
    with torch.no_grad():
        direction = torch.randn(model.lm_head.weight.shape[1], generator=torch.Generator().manual_seed(0)) * 1e3
        model.lm_head.weight.zero_()
        model.lm_head.weight[letters] = torch.stack([direction, -direction])
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


class Served:
    """A ``serve`` in a process of its own."""

    def __init__(self, folder: Path, port: int, *options: str, fault: Fault = no_fault) -> None:
        command = ["serve", "--model", "model", "--name", "m", "--port", str(port), *options]
        self.port = port
        self._running = Running(command, folder, fault)

    def wait_until_ready(self) -> bool:
        """Wait until it answers or ends, and return whether it answers."""
        return "models: " in self._running.read_until("models: ")

    def send(self, number: int) -> None:
        """Send the process a signal."""
        assert self._running.process.pid is not None
        os.kill(self._running.process.pid, number)

    def wait(self) -> Ended:
        """Wait for the end."""
        return self._running.wait()

    def health(self) -> int:
        """Return the status of ``/health``."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/health")
        with connection.getresponse() as answer:
            return answer.status

    def wait_until_closed(self) -> None:
        """Wait until it accepts no connections."""
        with suppress(ConnectionRefusedError):
            while True:
                socket.create_connection(("127.0.0.1", self.port), timeout=60).close()

    @contextmanager
    def answering(self, tokens: int) -> Iterator[Any]:
        """Ask for a streamed answer of so many tokens, and yield the stream after the first piece."""
        body = {"model": "m", "messages": [{"role": "user", "content": "Go on."}], "max_tokens": tokens, "stream": True}
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        with connection.getresponse() as stream:
            while b'"content": "A' not in (line := stream.readline()) and b'"content": "B' not in line:
                assert line
            yield stream
        connection.close()


def _assert_serves(folder: Path, port: int) -> None:
    """Check that a new server answers at a port, and that it stops."""
    again = Served(folder, port)
    assert again.wait_until_ready(), again.wait().output
    assert again.health() == 200
    again.send(signal.SIGTERM)
    ended = again.wait()
    assert ended.status == 0, ended.output


def _assert_explained(ended: Ended, status: int, *words: str) -> None:
    assert ended.status == status, ended.output
    assert "Traceback" not in ended.output, ended.output
    assert "unexpected" not in ended.output, ended.output
    assert all(word in ended.output for word in ("error: ", *words)), ended.output


def _slow_down() -> None:
    """Let an answer of 1500 tokens take more than two minutes, so that it is under way when a signal comes."""
    plain = DecodingBatch.step

    def step(batch: DecodingBatch) -> None:
        time.sleep(0.1)
        plain(batch)

    DecodingBatch.step = step  # type: ignore[method-assign]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.mark.parametrize(
    ("number", "moment"),
    each(
        0,
        (signal.SIGINT, "loading"), (signal.SIGINT, "idle"), (signal.SIGINT, "answering"),
        (signal.SIGTERM, "loading"), (signal.SIGTERM, "idle"), (signal.SIGTERM, "answering"),
        (signal.SIGKILL, "loading"), (signal.SIGKILL, "idle"), (signal.SIGKILL, "answering"),
    ),
)  # fmt: skip
def test_a_signal(number: signal.Signals, moment: str, checkpoint: Path) -> None:
    port = _free_port()
    fault = signal_at(number, "model", LOADING) if moment == "loading" else no_fault
    server = Served(checkpoint, port, fault=fault)
    if moment != "loading":
        assert server.wait_until_ready(), server.wait().output
    if moment == "idle":
        assert server.health() == 200
        server.send(number)
    elif moment == "answering":
        with server.answering(tokens=60) as stream:
            server.send(number)
            rest = b"" if number == signal.SIGKILL else stream.read()
        assert number == signal.SIGKILL or b"[DONE]" in rest  # the answer was completed
    ended = server.wait()
    if number == signal.SIGKILL:
        assert ended.status == -number
    elif moment == "loading":
        _assert_explained(ended, INTERRUPTED, "interrupted")
    else:
        assert (ended.status, "error" in ended.output) == (0, False), ended.output
    _assert_serves(checkpoint, port)


@pytest.mark.parametrize((), each(9, ()))
def test_a_second_ctrl_c_ends_the_answers(checkpoint: Path) -> None:
    server = Served(checkpoint, _free_port(), fault=_slow_down)
    assert server.wait_until_ready(), server.wait().output
    with server.answering(tokens=1500) as stream:
        server.send(signal.SIGINT)
        server.wait_until_closed()  # two signals at once are one
        server.send(signal.SIGINT)
        assert b"[DONE]" not in stream.read()
    ended = server.wait()
    assert ended.status == 0, ended.output
    assert "Traceback" not in ended.output
    _assert_serves(checkpoint, server.port)


@pytest.mark.parametrize((), each(10, ()))
def test_two_servers_at_one_port(checkpoint: Path) -> None:
    """The second fails at once, whether the first one still loads its model or answers already."""
    port = _free_port()
    both = [Served(checkpoint, port) for _ in range(2)]
    serving = [server for server in both if server.wait_until_ready()]
    assert len(serving) == 1
    (failed,) = (server.wait() for server in both if server not in serving)
    _assert_explained(failed, ENVIRONMENT, f"127.0.0.1:{port}", "Address already in use", "Fix: ", "--port")
    assert serving[0].health() == 200
    late = Served(checkpoint, port).wait()
    _assert_explained(late, ENVIRONMENT, f"127.0.0.1:{port}", "Address already in use", "Fix: ", "--port")
    serving[0].send(signal.SIGTERM)
    assert serving[0].wait().status == 0


@pytest.mark.parametrize("kind", each(11, "full", "read-only"))
def test_no_room_for_the_files_of_the_page(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    temporary.chmod(0o555 if kind == "read-only" else 0o755)
    faults = {"full": full_disk(0), "read-only": obey_permissions}
    server = Served(checkpoint, _free_port(), "--ui", fault=partial(use_temporary, str(temporary), faults[kind]))
    ended = server.wait()
    _assert_explained(ended, ENVIRONMENT, str(temporary), "cannot be written", "Fix: ")
    assert "sdpa" not in ended.output  # told before the model is loaded
    assert list(temporary.iterdir()) == []
    _assert_serves(checkpoint, server.port)
