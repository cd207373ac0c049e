r"""Output of the commands: results go to stdout, everything else to stderr.

Text of models, files and file names can contain control characters that move the cursor, change the window or reorder
the line. They are shown as escapes such as ``\x1b``, on a terminal and in a pipe alike, because a file of output is
shown on a terminal later. In JSON they are JSON's own escapes, so that a program reads the text unchanged.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import typer

from llavar_peft.errors import InterruptedRunError

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from llavar_peft.page.findings import Finding
    from llavar_peft.weights.io.folder_writer import WeightsReport

Counter: TypeAlias = AbstractContextManager[Callable[[int, int], None]]
"""A progress bar: a context that returns a function of the number done and the total."""
_FILE_WIDTH = 160  # characters of a line when stdout is not a terminal

# The control characters except tab and line feed, the directions that text can be forced into, and halves of
# characters, which file names that are not UTF-8 contain.
_CONTROLS: Final = (
    *range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),
)  # fmt: skip
_ESCAPES: Final = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _CONTROLS}
_JSON_ESCAPES: Final = {code: f"\\u{code:04x}" for code in _CONTROLS}


def prepare_streams() -> None:
    """Let stdout and stderr escape the characters that their encoding does not have, instead of raising an error.

    Input that is not in the encoding of stdin is kept, and rejected where it is used.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        with suppress(OSError, ValueError):
            sys.stdin.reconfigure(errors="surrogateescape")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(OSError, ValueError):
                stream.reconfigure(errors="backslashreplace")


def make_safe(text: str) -> str:
    """Return a text with escapes instead of the characters that control a terminal; line ends and tabs stay."""
    return text.replace("\r\n", "\n").translate(_ESCAPES)


def _echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text. typer would print UTF-8 where the encoding is ASCII, as a terminal that is not set up says."""
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    typer.echo(text.encode(encoding, "backslashreplace").decode(encoding), err=err, nl=nl)


def say(text: str) -> None:
    """Print a result, without wrapping or colour, so that it can be piped."""
    _echo(make_safe(text))


def say_piece(text: str) -> None:
    """Print a part of a line without delay."""
    _echo(make_safe(text), nl=False)


def say_json(value: Any) -> None:
    """Print a result as one line of JSON."""
    text = json.dumps(value, ensure_ascii=False).translate(_JSON_ESCAPES)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value).translate(_JSON_ESCAPES)
    typer.echo(text)


def with_released_key(finding: dict[str, Any]) -> dict[str, Any]:
    """Return a finding with its fix under the key of version 0.1 too, for programs that read the JSON output."""
    return {**finding, "mend": finding["fix"]}


def say_weights(report: WeightsReport) -> None:
    """Print what was written to a folder of weights."""
    say(f"{report.out}: {report.tensors} tensors, {report.nbytes / 1e9:.2f} GB in {report.seconds:.0f} s")


def say_next(findings: Sequence[Finding]) -> None:
    """Print what the figures say about the next step, on stderr: what is on stdout may be read by programs."""
    for finding in findings:
        _echo(f"next: {make_safe(finding.text)}", err=True)


def complain(text: str) -> None:
    """Print an error."""
    # click does not follow NO_COLOR (https://no-color.org).
    color = None if os.environ.get("NO_COLOR") else typer.colors.RED
    _echo(typer.style(f"error: {make_safe(text)}", fg=color), err=True)


@contextmanager
def resumable(where: Path) -> Iterator[None]:
    """Say that a command that keeps its results was interrupted, and how to resume it."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedRunError.at(
            str(where), "interrupted; results so far are kept", "run the same command again to resume"
        ) from None


def is_first_rank() -> bool:
    """Return True in the process that prints for all; launchers of torch.distributed set RANK."""
    return os.environ.get("RANK", "0") == "0"


def format_interval(low: float, high: float) -> str:
    """Format an interval."""
    return f"{low:.2f} to {high:.2f}"


def print_table(titles: Sequence[str], rows: Sequence[Sequence[object]], *, text_columns: int = 1) -> None:
    """Print a table.

    Args:
        titles: Titles of the columns.
        rows: The cells; None is an empty one.
        text_columns: Number of columns on the left that contain text; the others contain numbers.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*titles)
    for column in table.columns[text_columns:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*(Text("" if cell is None else make_safe(str(cell))) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    console.print(table)


def show_progress(action: str) -> Counter:
    """Return a progress bar of bytes on stderr, with speed and remaining time; it is hidden without a terminal."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    return _bar(action, DownloadColumn(), TransferSpeedColumn())


def show_count(action: str) -> Counter:
    """Return a progress bar of items on stderr; without a terminal, it prints a line for each tenth."""
    from rich.progress import MofNCompleteColumn

    return _bar(action, MofNCompleteColumn(), lines=True)


@contextmanager
def _bar(action: str, *figures: ProgressColumn, lines: bool = False) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(action), BarColumn(), *figures, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, tenths = bar.add_task(action, total=None), 0

        def update(done: int, total: int) -> None:
            nonlocal tenths
            bar.update(task, completed=done, total=total)
            if lines and not console.is_terminal and total and done * 10 // total > tenths:
                tenths = done * 10 // total
                typer.echo(f"{action}: {done} of {total}", err=True)

        yield update
