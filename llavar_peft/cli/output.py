"""How commands speak: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import typer

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

Counter: TypeAlias = AbstractContextManager[Callable[[int, int], None]]
"""A bar: a context that gives what to call with the number done and the number in all."""


def say(text: str) -> None:
    """Print a result, unwrapped and uncoloured, so that it can be piped."""
    typer.echo(text)


def say_piece(text: str) -> None:
    """Print a part of a result that goes on in the same line, at once."""
    typer.echo(text, nl=False)


def say_json(value: Any) -> None:
    """Print a result for programs, as one JSON document in a line."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def complain(text: str) -> None:
    """Print an error."""
    typer.secho(f"error: {text}", err=True, fg=typer.colors.RED)


def is_first_rank() -> bool:
    """Whether this process speaks for a run of several: torch.distributed's launchers set RANK."""
    return os.environ.get("RANK", "0") == "0"


def show_progress(what: str) -> Counter:
    """A bar of bytes on stderr, with speed and time left; nothing where that is no terminal.

    Args:
        what: Is being done.

    Returns:
        A context, which gives what is to be called with the bytes done and the bytes in all.
    """
    from rich.progress import DownloadColumn, TransferSpeedColumn

    return _bar(what, DownloadColumn(), TransferSpeedColumn())


def show_count(what: str) -> Counter:
    """A bar of things on stderr, with their number and the time left; where that is no terminal, a line for each tenth.

    Args:
        what: Is being done.

    Returns:
        A context, which gives what is to be called with the number done and the number in all.
    """
    from rich.progress import MofNCompleteColumn

    return _bar(what, MofNCompleteColumn(), lines=True)


@contextmanager
def _bar(what: str, *figures: ProgressColumn, lines: bool = False) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), *figures, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, tenths = bar.add_task(what, total=None), 0

        def update(done: int, total: int) -> None:
            nonlocal tenths
            bar.update(task, completed=done, total=total)
            if lines and not console.is_terminal and total and done * 10 // total > tenths:
                tenths = done * 10 // total
                typer.echo(f"{what}: {done} of {total}", err=True)

        yield update
