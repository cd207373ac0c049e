"""The one idea that both parts share: a page as a square grid of cells, each holding one character or nothing.

The vision tower learns to say which character stands in each patch of a picture; the language model learns to read
pages whose cells are filled with its own character embeddings. Neither sees the other's side: the projector that joins
them is what stage 1 trains.
"""

from collections.abc import Iterable

SIDE = 12
"""Cells along a side: 12 patches of 10 pixels are a picture of 120."""

CELL = 10
"""Pixels along a cell's side."""

CHARACTERS = "".join(chr(code) for code in range(0x20, 0x7F))
"""What can stand in a cell: printable ASCII. The space is a character only between two words of one line."""

BLANK = len(CHARACTERS)
"""The class of an empty cell."""


def fill_cells(lines: Iterable[list[tuple[str, float, float]]]) -> list[int]:
    """Put characters into cells.

    A character belongs to the cell its middle lies in, or, where the one before it has that cell, to the next on the
    right; what would leave the grid is dropped.

    Args:
        lines: For each line its characters with the x and y of their middle, in cells, from left to right.

    Returns:
        `SIDE * SIDE` classes, row by row: indices into `CHARACTERS`, or `BLANK`.
    """
    cells = [BLANK] * (SIDE * SIDE)
    for line in lines:
        last = -1
        for character, x, y in line:
            column, row = max(int(x), last + 1), int(y)
            if 0 <= row < SIDE and x >= 0 and column < SIDE:
                cells[row * SIDE + column] = CHARACTERS.index(character)
                last = column
    return cells
