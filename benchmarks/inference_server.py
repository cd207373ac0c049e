"""Load test of ``llavar-peft serve``: concurrent clients send requests without pause, and each answer is checked."""

from __future__ import annotations

import base64
import http.client
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil

HOST = "127.0.0.1"
_TIMEOUT = 120.0  # seconds for the server to start, to answer, and to stop


@dataclass
class Tally:
    """The results of the clients.

    Attributes:
        times: Seconds of each answer.
        firsts: Seconds to the first text of each streamed answer.
        wrong: Answers that differ from the single client's, each with that one.
        failed: Errors of the requests without an answer.
    """

    times: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    wrong: list[tuple[str, str]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def summary(self, seconds: float) -> dict[str, Any]:
        """Return rates and latencies over a time in seconds."""
        if not self.times:
            raise SystemExit(f"the server gave no answer: {self.failed[:3]}")
        ordered = sorted(self.times)
        return {
            "answers": len(ordered),
            "seconds": seconds,
            "rate": len(ordered) / seconds,
            "median": statistics.median(ordered),
            "late": ordered[int(0.95 * (len(ordered) - 1))],
            "first": statistics.median(self.firsts) if self.firsts else None,
        }


def make_bodies(model: str, data: Path, asked: Sequence[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """Return the questions as greedy requests of an OpenAI client."""
    bodies = []
    for one in asked:
        image = base64.b64encode((data / "images" / one["image"]).read_bytes()).decode()
        parts = [
            {"type": "text", "text": one["text"]},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
        ]
        messages = [{"role": "user", "content": parts}]
        bodies.append({"model": model, "messages": messages, "temperature": 0, "max_tokens": tokens})
    return bodies


class Client:
    """A client with one persistent connection."""

    def __init__(self, port: int) -> None:
        self._http = http.client.HTTPConnection(HOST, port, timeout=_TIMEOUT)

    def get(self, path: str) -> Any:
        """Return the JSON at a path."""
        self._http.request("GET", path)
        return json.loads(self._http.getresponse().read())

    def ask(self, body: dict[str, Any], tally: Tally, *, stream: bool) -> str | None:
        """Send a request, record its time or its error, and return the answer or None."""
        began = time.perf_counter()
        try:
            self._http.request(
                "POST",
                "/v1/chat/completions",
                json.dumps({**body, "stream": stream}),
                {"Content-Type": "application/json"},
            )
            response = self._http.getresponse()
            if response.status != 200:
                tally.failed.append(f"{response.status}: {response.read()[:300]!r}")
                return None
            if stream:
                text = self._read_stream(response, tally, began)
            else:
                text = json.loads(response.read())["choices"][0]["message"]["content"]
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            tally.failed.append(f"{type(error).__name__}: {error}")
            self._http.close()
            return None
        tally.times.append(time.perf_counter() - began)
        return text

    @staticmethod
    def _read_stream(response: http.client.HTTPResponse, tally: Tally, began: float) -> str:
        text = ""
        while line := response.readline():
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            choices = json.loads(line[6:])["choices"]
            piece = (choices[0]["delta"].get("content") or "") if choices else ""
            if piece and not text:
                tally.firsts.append(time.perf_counter() - began)
            text += piece
        return text


class Memory(threading.Thread):
    """Records a process's resident memory every quarter of a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.sizes: list[int] = []
        self._process, self._done = psutil.Process(pid), threading.Event()
        self.start()

    def run(self) -> None:
        """Record until stopped."""
        while not self._done.wait(0.25):
            try:
                self.sizes.append(self._process.memory_info().rss)
            except psutil.Error:
                return

    def stop(self) -> dict[str, float]:
        """Stop, and return the medians of the second and last quarter, their relative difference, and the maximum."""
        self._done.set()
        self.join()
        quarter = max(1, len(self.sizes) // 4)
        early, late = (
            statistics.median(part) for part in (self.sizes[quarter : 2 * quarter] or self.sizes, self.sizes[-quarter:])
        )
        return {"early": early, "late": late, "drift": late / early - 1, "most": max(self.sizes)}


def ask_all(
    port: int, bodies: Sequence[dict[str, Any]], *, clients: int, seconds: float, expected: Sequence[str]
) -> Tally:
    """Run concurrent clients, each of which sends random questions one after another until the time is over.

    Args:
        port: The server's port.
        bodies: The questions.
        clients: Number of clients; every second one streams.
        seconds: Duration.
        expected: The right answers.
    """
    tally, until = Tally(), time.monotonic() + seconds

    def work(number: int) -> None:
        client, draw = Client(port), Random(number)
        while time.monotonic() < until:
            place = draw.randrange(len(bodies))
            said = client.ask(bodies[place], tally, stream=bool(number % 2))
            if said is not None and said != expected[place]:
                tally.wrong.append((said, expected[place]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


def load_server(
    port: int, pid: int, bodies: Sequence[dict[str, Any]], *, clients: int, seconds: float
) -> dict[str, Any]:
    """Measure a running server.

    Args:
        port: The server's port.
        pid: The server's process.
        bodies: The questions.
        clients: Number of concurrent clients.
        seconds: Duration.

    Returns:
        The figures of ``one`` client and of ``many``, the numbers of ``wrong`` and ``failed`` answers, and ``memory``.
    """
    single, client = Tally(), Client(port)
    began = time.perf_counter()
    expected = [client.ask(body, single, stream=bool(number % 2)) for number, body in enumerate(bodies)]
    one = single.summary(time.perf_counter() - began)
    if single.failed:
        raise SystemExit(f"a single client got no answer: {single.failed[0]}")
    memory, began = Memory(pid), time.perf_counter()
    tally = ask_all(port, bodies, clients=clients, seconds=seconds, expected=[text or "" for text in expected])
    many = tally.summary(time.perf_counter() - began)
    return {
        "clients": clients,
        "one": one,
        "many": many,
        "wrong": len(tally.wrong),
        "failed": len(tally.failed),
        "examples": [*tally.wrong[:3], *tally.failed[:3]],
        "memory": memory.stop(),
    }


def measure_server(
    model: str, data: Path, asked: Sequence[dict[str, Any]], *, clients: int, seconds: float, tokens: int
) -> dict[str, Any]:
    """Start a server, measure it, and stop it.

    Args:
        model: The checkpoint.
        data: The folder of the images.
        asked: The questions.
        clients: Number of concurrent clients.
        seconds: Duration.
        tokens: Largest number of tokens in an answer.

    Returns:
        As ``load_server``, and the server's ``exit`` status.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llavar_peft", "serve", "--model", model, "--port", str(port)]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            name = _wait_until_ready(port, server)
            bodies = make_bodies(name, data, asked, tokens)
            found = load_server(port, server.pid, bodies, clients=clients, seconds=seconds)
        except BaseException:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace")[-3000:])
            server.kill()
            raise
        server.send_signal(signal.SIGTERM)
        found["exit"] = server.wait(_TIMEOUT)
    return found


def _wait_until_ready(port: int, server: subprocess.Popen[bytes]) -> str:
    """Wait until the server answers, and return the name of its model."""
    until = time.monotonic() + _TIMEOUT
    while server.poll() is None and time.monotonic() < until:
        try:
            name: str = Client(port).get("/v1/models")["data"][0]["id"]
        except (OSError, http.client.HTTPException):
            time.sleep(0.2)
        else:
            return name
    raise SystemExit(f"the server is not ready (exit status {server.returncode})")
