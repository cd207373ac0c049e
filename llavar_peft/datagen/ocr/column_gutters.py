"""Gutters: the white space between columns of text, which rows and tables must not cross."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from llavar_peft.datagen.ocr.page_geometry import Box

GUTTER_ROWS: Final = 3
"""Minimum number of wide pieces that begin at the right edge of a gutter."""
SAME_START: Final = 0.6
"""Maximum distance of their left edges, in heights."""


def narrow_gutters(boxes: Sequence[Box], near: Callable[[Box, Box], bool], narrow: float) -> list[Box]:
    """Return gutters no wider than spaces: gaps between wide pieces, where several wide pieces begin.

    Args:
        boxes: Pieces of lines.
        near: Whether two pieces would be parts of one line.
        narrow: Width in heights below which pieces may be cells of a table.
    """
    wide = [box for box in boxes if box.width >= narrow * box.height]
    gaps = [
        _between(first, second)
        for first in wide
        for second in wide
        if first.right < second.left
        and near(first, second)
        and sum(abs(one.left - second.left) <= SAME_START * second.height for one in wide) >= GUTTER_ROWS
    ]
    return _lengthen(gaps, wide)


def wide_gutters(prose: Sequence[Box], boxes: Sequence[Box]) -> list[Box]:
    """Return the gutters between paragraphs of prose side by side.

    Args:
        prose: Paragraphs of prose.
        boxes: All lines of the page, beyond which gutters do not extend.
    """
    gaps = [
        _between(first, second)
        for first in prose
        for second in prose
        if first.right < second.left and level(first, second)
    ]
    return _lengthen(gaps, boxes)


def separates(gutter: Box, first: Box, second: Box) -> bool:
    """Return whether a gutter lies between two boxes."""
    space = _between(first, second)
    return abreast(gutter, space) and level(gutter, space)


def abreast(first: Box, second: Box) -> bool:
    """Return whether two boxes share some x coordinate."""
    return max(first.left, second.left) < min(first.right, second.right)


def level(first: Box, second: Box) -> bool:
    """Return whether two boxes share some y coordinate."""
    return max(first.top, second.top) <= min(first.bottom, second.bottom)


def _between(first: Box, second: Box) -> Box:
    """Return the space between two boxes side by side, as high as both; its width is negative if they overlap."""
    return Box(
        min(first.right, second.right),
        min(first.top, second.top),
        max(first.left, second.left),
        max(first.bottom, second.bottom),
    )


def _lengthen(gaps: Sequence[Box], boxes: Sequence[Box]) -> list[Box]:
    """Return gaps up and down to the next box that crosses them."""
    longer = []
    for gap in gaps:
        crossing = [box for box in boxes if abreast(gap, box)]
        top = max((box.bottom for box in crossing if box.middle < gap.middle), default=-math.inf)
        bottom = min((box.top for box in crossing if box.middle >= gap.middle), default=math.inf)
        longer.append(Box(gap.left, min(top, gap.top), gap.right, max(bottom, gap.bottom)))
    return longer
