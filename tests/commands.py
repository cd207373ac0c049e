"""Run the command line in processes that are forked from one that has imported everything.

A fresh interpreter takes longer to import torch and transformers than most commands take to run.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

from llavar_peft.cli import main

PRELOADED = ["llavar_peft.cli.app", "tests.preloaded"]
"""The same everywhere, because a test process has one server that forks."""
_DEFAULT = multiprocessing.get_all_start_methods()[0]


@dataclass(frozen=True)
class Done:
    """The result of a process."""

    status: int | None
    stdout: str
    stderr: str


def command(arguments: Sequence[str], folder: Path) -> Done:
    """Run ``llavar-peft`` in a folder without a terminal."""
    return _run(run_command, list(arguments), folder)[0]


def python(code: str, folder: Path) -> Done:
    """Run Python code in a folder without a terminal."""
    return _run(_python, code, folder)[0]


def call(function: Callable[..., None], argument: object, folder: Path) -> Done:
    """Call a function in a folder without a terminal."""
    return _run(function, argument, folder)[0]


def ranks(
    function: Callable[..., None],
    argument: object,
    folder: Path,
    *,
    environment: Mapping[str, str] | None = None,
    nodes: int = 1,
    count: int = 2,
) -> list[Done]:
    """Call a function in a group of processes, two by default, with the variables that launchers give their ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {
        **(environment or {}), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count // nodes),
    }  # fmt: skip
    places = [
        {
            **group,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank % (count // nodes)),
            "GROUP_RANK": str(rank * nodes // count),
        }
        for rank in range(count)
    ]
    return _run(function, argument, folder, places)


def _run(
    function: Callable[..., None], argument: object, folder: Path, environments: Sequence[Mapping[str, str]] = ({},)
) -> list[Done]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    started = []
    for number, environment in enumerate(environments):
        streams = [folder / f".{name}{number}" for name in ("stdout", "stderr")]
        given = (function, argument, folder, streams, dict(environment))
        started.append((context.Process(target=_run_in_child, args=given), streams))
        started[-1][0].start()
    # A rank that has failed leaves the others waiting for it.
    while any(process.is_alive() for process, _ in started):
        wait([process.sentinel for process, _ in started if process.is_alive()])
        if any(process.exitcode for process, _ in started):
            for process, _ in started:
                process.terminate()
    done = []
    for process, streams in started:
        process.join()
        done.append(Done(process.exitcode, *(stream.read_text(encoding="utf-8") for stream in streams)))
        for stream in streams:
            stream.unlink()
    return done


def _run_in_child(
    function: Callable[..., None],
    argument: object,
    folder: Path,
    streams: Sequence[Path],
    environment: Mapping[str, str],
) -> None:
    import torch  # imported before the fork

    # Of the threads that read weights, two at a time would replace the pool that a fork leaves behind: "Invalid thread
    # pool". Here it is replaced by one.
    torch.set_num_threads(1)
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(folder)
    os.environ.update(environment)
    gc.freeze()  # a child that collects garbage would copy all pages of the modules
    # Start processes as a fresh interpreter does; otherwise each of them would import everything.
    multiprocessing.set_start_method(_DEFAULT, force=True)
    function(argument)


def run_command(arguments: Sequence[str]) -> None:
    """Run ``llavar-peft`` in this process, and end it."""
    sys.exit(main(arguments))


def _python(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
