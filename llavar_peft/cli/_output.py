"""How commands speak: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer


def say(text: str) -> None:
    """Prints a result, unwrapped and uncoloured, so that it can be piped."""
    typer.echo(text)


def say_piece(text: str) -> None:
    """Prints a part of a result that goes on in the same line, at once."""
    typer.echo(text, nl=False)


def say_json(value: Any) -> None:
    """Prints a result for programs, as one JSON document in a line."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def complain(text: str) -> None:
    """Prints an error."""
    typer.secho(f"error: {text}", err=True, fg=typer.colors.RED)


def is_first_rank() -> bool:
    """Whether this process speaks for a run of several: torch.distributed's launchers set RANK."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def show_progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes on stderr, with speed and time left; nothing where that is no terminal.

    Args:
        what: Is being done.

    Yields:
        To be called with the bytes done and the bytes in all.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def show_count(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of things done on stderr, with the time left; where that is no terminal, a line for each tenth.

    Args:
        what: Is being done.

    Yields:
        To be called with the things done and all of them.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        tenths = 0

        def update(done: int, total: int) -> None:
            nonlocal tenths
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and done * 10 // total > tenths:
                tenths = done * 10 // total
                typer.echo(f"{what}: {done} of {total}", err=True)

        yield update
