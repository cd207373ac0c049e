"""Run cases in forked workers: each has a limit of memory, and is ended when a case takes too long."""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import datasets
import psutil

from llavar_peft import cli
from llavar_peft.cli import app
from llavar_peft.errors import LlavarError
from tests.fuzz.mutations import damage_file
from tests.fuzz.targets import TARGETS, Target, choose_uses, serving_app, split_use

SECONDS = 10
"""CPU time of a case; more is a hang, if it happens twice."""
_PATIENCE = 3  # times as much for the second time, in which a slow start of a worker does not count
IDLE_SECONDS = 120
"""Time in which a case that is not a hang gets some CPU time, however busy the machine is."""
_SOME = 0.1  # seconds of CPU time
MEMORY = 2 << 30
"""Bytes of address space that a worker may take beyond those of its parent."""
_WRITTEN = ("request.json", "answers.jsonl", "read.report.json")
"""Not replaced by a folder: the first is no file of a user, the others are written."""
_BATCH = 50  # cases of a forked worker
_GOOD = (0, 2, 3, 4)
_OUT_OF_MEMORY = ("MemoryError", "not enough memory", "allocate memory", "DefaultCPUAllocator", "bad_alloc")
_WIDTH = 300
_LONGEST = 3000
"""Characters of a message."""


@dataclass(frozen=True)
class Failure:
    """A case that did not end as it should."""

    target: str
    seed: int
    kind: str
    use: str
    damaged: str
    details: str

    def __str__(self) -> str:
        where = [line[:_WIDTH] for line in self.details.strip().splitlines()]
        return (
            f"{self.kind}: {self.damaged}; {self.use}\n    " + "\n    ".join(where[-6:]) + "\n    again: "
            f'make fuzz FUZZ_ARGS="--target {self.target} --seed {self.seed}"'
        )


Case = tuple[str, int]


def run_cases(
    cases: Sequence[Case], files: Path, *, workers: int, keep: bool = False, stop: float = float("inf")
) -> Iterator[Failure | Case]:
    """Run cases, and yield each that is done, as a failure if it was one.

    Args:
        cases: Target and seed.
        files: The valid files.
        workers: Number of processes.
        keep: Keep the files of each case, and print everything.
        stop: Time of ``time.monotonic`` after which no worker is started.
    """
    waiting = list(reversed(cases))
    running: dict[Connection, _Worker] = {}
    slow: set[Case] = set()
    while waiting or running:
        if time.monotonic() > stop:
            waiting.clear()
        while waiting and len(running) < workers:
            started = _Worker([waiting.pop() for _ in range(min(_BATCH, len(waiting)))], files, keep)
            running[started.connection] = started
        ready = wait(list(running), timeout=0.5)
        for connection in list(running):
            worker = running[connection]
            if connection in ready:
                yield from worker.receive()
            elif worker.left and worker.is_overdue(_PATIENCE if worker.left[0] in slow else 1):
                worker.kill()
                if worker.left[0] in slow:
                    yield worker.fail("hang", worker.times())
                else:
                    slow.add(worker.left[0])
            if worker.ended:
                waiting += reversed(worker.left)
                del running[connection]


def run_valid_files(names: Sequence[str], files: Path) -> Iterator[str]:
    """Read the undamaged files of each target, and yield what fails; this also imports what the workers need."""
    for name in names:
        for use in TARGETS[name].uses:
            with tempfile.TemporaryDirectory() as folder:
                os.chdir(folder)
                _copy(TARGETS[name].copies, files)
                arguments = split_use(use)
                status, printed = _main(arguments) if arguments is not None else (0, _run_function(use)[1])
                if (status or (arguments is None and printed)) and name != "converse":
                    yield f"{name}: {use}: {status} {printed[-300:]}"
                os.chdir("/")


class _Worker:
    def __init__(self, cases: list[Case], files: Path, keep: bool) -> None:
        self.left = cases
        self.ended = False
        self.connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self._process = context.Process(target=_work, args=(theirs, list(cases), files, keep))
        self._process.start()
        theirs.close()
        self._started, self._cpu, self._what = time.monotonic(), 0.0, ("", "")
        self._advanced = (self._started, 0.0)

    def receive(self) -> Iterator[Failure | Case]:
        """Yield what the worker has sent."""
        try:
            kind, value = self.connection.recv()
        except EOFError:
            self._process.join()
            self.ended = True
            if self.left:
                yield self.fail("killed", f"the worker ended with status {self._process.exitcode}")
            return
        if kind == "start":
            self._what = value
            self._started, self._cpu = time.monotonic(), self._cpu_time()
            self._advanced = (self._started, self._cpu)
            return
        yield value if value is not None else self.left[0]
        self.left = self.left[1:]

    def is_overdue(self, patience: int) -> bool:
        """Return whether the case takes too much CPU time, or waits for something that does not happen."""
        if self.ended or not self._what[0]:
            return False
        now, cpu = time.monotonic(), self._cpu_time()
        if cpu - self._advanced[1] > _SOME:
            self._advanced = (now, cpu)
        return cpu - self._cpu > SECONDS * patience or now - self._advanced[0] > IDLE_SECONDS * patience

    def times(self) -> str:
        """Return how long the case has run."""
        return f"{self._advanced[1] - self._cpu:.1f} s of CPU time, {time.monotonic() - self._started:.1f} s in all"

    def kill(self) -> None:
        """End the worker."""
        self._process.kill()
        self._process.join()
        self.ended = True

    def _cpu_time(self) -> float:
        try:
            used = psutil.Process(self._process.pid).cpu_times()
        except psutil.Error:
            return self._cpu
        return float(used.user + used.system)

    def fail(self, kind: str, details: str) -> Failure:
        """Return the failure of the case, which is not run again."""
        (target, seed), self.left = self.left[0], self.left[1:]
        return Failure(target, seed, kind, self._what[1], self._what[0], details)


def _work(connection: Connection, cases: list[Case], files: Path, keep: bool) -> None:
    gc.freeze()
    serving_app.cache_clear()  # its threads are not forked
    datasets.config.HF_DATASETS_CACHE = "cache"  # in the folder of the case
    warnings.simplefilter("ignore")
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    null = os.open(os.devnull, os.O_RDWR)
    if not keep:
        for number in (0, 1, 2):
            os.dup2(null, number)
    for name, seed in cases:
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-{seed}-"))
        os.chdir(folder)
        try:
            failure = _run_case(name, seed, files, connection)
        finally:
            os.chdir("/")
            if keep:
                print(f"the case's files: {folder}", file=sys.stderr)  # noqa: T201
            else:
                shutil.rmtree(folder, ignore_errors=True)
        connection.send(("done", failure))
    connection.close()


def _run_case(name: str, seed: int, files: Path, connection: Connection) -> Failure | None:
    target, draw = TARGETS[name], random.Random(f"{name} {seed}")
    _copy(target.copies, files)
    damaged = _damage(target, draw)
    for use in choose_uses(target, draw):
        arguments = split_use(use)
        label = use if isinstance(use, str) else use.__name__
        connection.send(("start", (damaged, label)))
        kind, details = _run_command(arguments) if arguments is not None else _run_function(use)
        if kind:
            return Failure(name, seed, kind, label, damaged, details)
    return None


def _copy(names: str, files: Path) -> None:
    for name in (*names.split(), "results.answers.jsonl", "labelled.json", "mine.yaml"):
        source, goal = files / name, Path(name)
        if goal.exists():
            continue
        goal.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, goal) if source.is_dir() else shutil.copy2(source, goal)


def _damage(target: Target, draw: random.Random) -> str:
    pattern = draw.choice(target.victims.split())
    found = sorted(path for path in Path().glob(pattern) if path.is_file()) or [Path(pattern.replace("*", "x"))]
    chosen = [draw.choice(found) for _ in range(draw.choice((1, 1, 1, 1, 2)))]
    for path in chosen:
        data = (
            path.read_bytes()
            if path.is_file()
            else draw.choice((b'{"<x>": 1}', b"{}", b"[]", b'{"size": {"height": 1}}'))
        )
        if draw.random() < 0.01 and path.name not in _WRITTEN:
            path.unlink(missing_ok=True)
            path.mkdir(exist_ok=True)
        elif path.parent.is_dir() and not path.is_dir():
            path.unlink(missing_ok=True)
            path.write_bytes(damage_file(path.name, data, draw))
    return ", ".join(map(str, chosen))


def keep_command_line() -> None:
    """Build the table of commands once."""
    table = app.build_app()
    app.build_app = lambda: table


def _run_command(arguments: list[str]) -> tuple[str, str]:
    status, printed = _main(arguments)
    if any(word in printed for word in _OUT_OF_MEMORY):
        return "memory", printed[-400:]
    if status not in _GOOD:
        return "traceback", _main(["--debug", *arguments])[1]
    if "Traceback (most recent call last)" in printed:
        return "traceback", printed
    messages = [line for line in printed.splitlines() if line.startswith("error: ")]
    if any(len(line) > _LONGEST for line in messages):
        return "message", f"{max(map(len, messages))} characters: {max(messages, key=len)[:300]}"
    if status in (2, 3) and not printed.strip():
        return "message", "no message"
    return "", ""


def _main(arguments: list[str]) -> tuple[Any, str]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = cli.main(arguments)
    return status, printed.getvalue()


def _run_function(use: Any) -> tuple[str, str]:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            use()
    except LlavarError as error:
        text = str(error)
        if any(word in text for word in _OUT_OF_MEMORY):
            return "memory", text[-400:]
        longest = max(map(len, text.splitlines()), default=0)
        return ("message", f"{longest} characters: {text[:300]}") if longest > _LONGEST else ("", "")
    except MemoryError:
        return "memory", traceback.format_exc()
    except Exception as error:  # noqa: BLE001 - what is looked for
        kind = "disagreement" if type(error).__name__ == "DisagreementError" else "traceback"
        return kind, traceback.format_exc()
    return "", ""
