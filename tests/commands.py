"""Run the command line in processes that are forked from one that has imported everything.

A fresh interpreter takes longer to import torch and transformers than most commands take to run.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llavar_peft.cli import main

_PRELOADED = [
    "llavar_peft.cli", "llavar_peft.inference", "llavar_peft.models.merge_adapter", "llavar_peft.training.dry_run",
    "llavar_peft.training.trainer", "peft",
]  # fmt: skip
_DEFAULT = multiprocessing.get_all_start_methods()[0]


@dataclass(frozen=True)
class Done:
    """The result of a process."""

    status: int | None
    stdout: str
    stderr: str


def command(arguments: Sequence[str], folder: Path) -> Done:
    """Run ``llavar-peft`` in a folder without a terminal."""
    return _run(_command, list(arguments), folder)


def python(code: str, folder: Path) -> Done:
    """Run Python code in a folder without a terminal."""
    return _run(_python, code, folder)


def _run(function: Callable[..., None], argument: object, folder: Path) -> Done:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    streams = [folder / f".{name}" for name in ("stdout", "stderr")]
    process = context.Process(target=_run_in_child, args=(function, argument, folder, streams))
    process.start()
    process.join()
    outputs = [stream.read_text(encoding="utf-8") for stream in streams]
    for stream in streams:
        stream.unlink()
    return Done(process.exitcode, *outputs)


def _run_in_child(function: Callable[..., None], argument: object, folder: Path, streams: Sequence[Path]) -> None:
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(folder)
    gc.freeze()  # a child that collects garbage would copy all pages of the modules
    # Start processes as a fresh interpreter does; otherwise each of them would import everything.
    multiprocessing.set_start_method(_DEFAULT, force=True)
    function(argument)


def _command(arguments: Sequence[str]) -> None:
    sys.exit(main(arguments))


def _python(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
