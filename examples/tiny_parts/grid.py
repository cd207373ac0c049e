"""The one idea that both parts share: a page as a square grid of cells, each holding one character or nothing.

The vision tower learns to say which character stands in each patch of an image; the language model learns to read
pages whose cells are filled with its own character embeddings. Neither sees the other's side: the projector that joins
them is what stage 1 trains.
"""

from collections.abc import Iterable
from typing import TypeAlias

from llavar_peft.datagen.synth.font_faces import CAP_HEIGHT, text_width
from llavar_peft.datagen.synth.scene import PlacedLine

SIDE = 12
"""Cells along a side: 12 patches of 10 pixels are an image of 120."""

CELL = 10
"""Pixels along a cell's side."""

CHARACTERS = "".join(chr(code) for code in range(0x20, 0x7F))
"""What can stand in a cell: printable ASCII. The space is a character only between two words of one line."""

BLANK = len(CHARACTERS)
"""The class of an empty cell."""

RAMP = 0.2
"""How near to a cell's edge, in cells, a character's middle must lie for the next cell to get a share of it."""

Line: TypeAlias = list[tuple[str, float, float]]
"""Characters with the x and y of their middle, mostly in cells, from left to right."""

Cells: TypeAlias = tuple[list[int], list[float]]
"""Row by row, each cell's class and how much of it there is; the rest of the cell is blank."""


def centres(line: PlacedLine) -> Line:
    """A drawn line's characters with the x and y of their middles in pixels; y is the middle of the capitals."""
    y = line.baseline - CAP_HEIGHT * line.size / 2
    ends = [line.left + line.size * text_width(line.text[:n], line.face) for n in range(len(line.text) + 1)]
    return [(c, (a + b) / 2, y) for c, a, b in zip(line.text, ends, ends[1:], strict=False)]


def fill_cells(lines: Iterable[Line]) -> Cells:
    """Put characters into cells.

    A character belongs to the cell its middle lies in, or, where the one before it has that cell, to the next on the
    right; what would leave the grid is dropped. Near an edge it is shared with the cell beyond, if that is free: half
    and half at the very edge, so that nothing hangs on which side of it a letter's middle lies.

    Args:
        lines: The page's lines.

    Returns:
        Classes (indices into `CHARACTERS`, or `BLANK`) and shares of `SIDE * SIDE` cells.
    """
    classes, shares = [BLANK] * (SIDE * SIDE), [1.0] * (SIDE * SIDE)
    placed: list[tuple[int, int, int, float, float]] = []
    for line in lines:
        last = -1
        for character, x, y in line:
            column, row = max(int(x), last + 1), int(y)
            if x >= 0 and y >= 0 and row < SIDE and column < SIDE:
                kind = CHARACTERS.index(character)
                classes[row * SIDE + column] = kind
                placed.append((kind, column, row, x - column, y - row))
                last = column
    taken = {n for n, kind in enumerate(classes) if kind != BLANK}
    for kind, column, row, x, y in placed:
        (beside, x_share), (beyond, y_share) = _overlap(x), _overlap(y)
        rest = 1.0
        for other_column, other_row, share in (
            (column + beside, row, x_share * (1 - y_share)),
            (column, row + beyond, (1 - x_share) * y_share),
            (column + beside, row + beyond, x_share * y_share),
        ):
            cell = other_row * SIDE + other_column
            if share > 0 and 0 <= other_column < SIDE and 0 <= other_row < SIDE and cell not in taken:
                rest -= share
                if classes[cell] == BLANK or shares[cell] < share:
                    classes[cell], shares[cell] = kind, share
        shares[row * SIDE + column] = rest
    return classes, shares


def _overlap(place: float) -> tuple[int, float]:
    """Which neighbour a place within a cell (0 to 1) leans to, and that one's share."""
    if 0 <= place < RAMP:
        return -1, 0.5 * (1 - place / RAMP)
    if 1 - RAMP < place < 1:
        return 1, 0.5 * (1 - (1 - place) / RAMP)
    return 0, 0.0
