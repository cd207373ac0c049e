"""Tables on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_FILE_WIDTH = 160
"""Letters in a line where no terminal says how many it has."""


class Bounded(Protocol):
    """A figure with an interval."""

    @property
    def low(self) -> float:
        """Lower end."""
        ...

    @property
    def high(self) -> float:
        """Upper end."""
        ...


def interval(figure: Bounded) -> str:
    """Spell an interval."""
    return f"{figure.low:.2f} to {figure.high:.2f}"


def print_table(titles: Sequence[str], rows: Sequence[Sequence[object]], *, words: int = 1) -> None:
    """Print a table.

    Args:
        titles: Of its columns.
        rows: Its cells; None is an empty one.
        words: How many columns on the left hold words; those after them hold numbers.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*titles)
    for column in table.columns[words:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    console.print(table)
