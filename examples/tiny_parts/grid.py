"""The representation that both parts share: a page as a square grid of cells, each empty or with one character.

The vision tower learns to predict the character in each patch of an image. The language model learns to read pages
whose cells contain its own character embeddings. They are trained separately; stage 1 trains the projector that joins
them.
"""

from collections.abc import Iterable
from typing import TypeAlias

from llavar_peft.datagen.synth.font_faces import CAP_HEIGHT, text_width
from llavar_peft.datagen.synth.scene import PlacedLine

SIDE = 12
"""Number of cells per side, and of a tower's patches."""

CHARACTERS = "".join(chr(code) for code in range(0x20, 0x7F))
"""The characters of a cell: printable ASCII. A space counts as a character only between two words of a line."""

BLANK = len(CHARACTERS)
"""The class of an empty cell."""

RAMP = 0.2
"""Distance from a cell's edge, in cells, below which a character is shared with the neighboring cell."""

Line: TypeAlias = list[tuple[str, float, float]]
"""Characters with the x and y of their center, mostly in cells, from left to right."""

Cells: TypeAlias = tuple[list[int], list[float]]
"""Class of each cell, row by row, and the class's share of the cell; the rest of the cell is blank."""


def centres(line: PlacedLine) -> Line:
    """Return a drawn line's characters with the x and y of their centers in pixels; y is the capitals' center."""
    y = line.baseline - CAP_HEIGHT * line.size / 2
    ends = [line.left + line.size * text_width(line.text[:n], line.face) for n in range(len(line.text) + 1)]
    return [(c, (a + b) / 2, y) for c, a, b in zip(line.text, ends, ends[1:], strict=False)]


def fill_cells(lines: Iterable[Line]) -> Cells:
    """Put the characters of a page into cells.

    A character belongs to the cell that contains its center or, if the previous character has that cell, to the next
    one on the right; characters outside the grid are dropped. Near an edge, a character is shared with the cell beyond
    it if that cell is free, equally at the edge itself, so that the target is continuous in the character's position.

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
    """Return the neighbor (-1, 0 or 1) that shares a position within a cell (0 to 1), and its share."""
    if 0 <= place < RAMP:
        return -1, 0.5 * (1 - place / RAMP)
    if 1 - RAMP < place < 1:
        return 1, 0.5 * (1 - (1 - place) / RAMP)
    return 0, 0.0
