"""Merge lines into paragraphs, by geometry alone.

Three steps, none of which depends on the order of the lines: pieces on one baseline with a small gap form a row; rows
below each other with similar height in one column form a paragraph; paragraphs side by side whose rows align, at least
one of them narrow, form a table, which is read row by row. All limits are multiples of the line height, so that moving
or scaling a page changes nothing.

Source: arXiv 2306.17107 states that paragraphs were merged by geometry, but not how; these rules are our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from statistics import median
from typing import Final, TypeVar

from llavar_peft.datagen.ocr.ocr_engines import OcrLine
from llavar_peft.datagen.ocr.page_geometry import Box, reading_order, upright_boxes

SAME_BASELINE: Final = 0.5
"""Maximum distance of two pieces' centres on one baseline, in heights."""
WIDEST_SPACE: Final = 0.8
"""Maximum gap between two pieces of one row, in heights."""
LINE_DISTANCE: Final = 1.75
"""Maximum distance of the centres of two rows of a paragraph, in heights."""
EVEN: Final = 1.4
"""Maximum of that distance as a multiple of the distance to the nearest row: a wider one ends a paragraph."""
SAME_HEIGHT: Final = 0.7
"""Minimum ratio of the heights of two rows of a paragraph."""
SAME_EDGE: Final = 2.0
"""Maximum distance of the left edges, centres or right edges of one column, in heights."""
SAME_ROW_HEIGHT: Final = 0.4
"""Minimum ratio of heights in a row of a table, where a cell may have no ascenders."""
PAIRED: Final = 2 / 3
"""Minimum fraction of the shorter column's rows that have a counterpart in a table."""
NARROW: Final = 6.0
"""Width, in heights, below which a column may contain a table's cells."""
PROSE: Final = 9.0
"""Width, in heights, from which ``PROSE_LINES`` rows are prose and not cells."""
PROSE_LINES: Final = 3

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Lines that form one paragraph, in reading order; ``text`` is the lines joined by spaces."""

    text: str
    lines: tuple[OcrLine, ...]


@dataclass(frozen=True, slots=True)
class _Row:
    """Pieces on one baseline, from left to right; ``height`` is their median, because slant makes ``box`` higher."""

    pieces: tuple[tuple[Box, OcrLine], ...]
    box: Box
    height: float


def merge_lines(lines: Sequence[OcrLine]) -> tuple[Paragraph, ...]:
    """Merge the lines of a page into paragraphs in reading order.

    Args:
        lines: In any order, which does not affect the result.

    Returns:
        Paragraphs that contain each line exactly once.
    """
    placed = sorted(zip(upright_boxes(lines), lines, strict=True), key=_sort_key)
    rows = [_row(group) for group in _connected(placed, lambda a, b: _same_line(a[0], b[0]))]
    rows.sort(key=lambda row: (row.box.top, row.box.left))
    blocks = [_by_top(group) for group in _paragraph_rows(rows)]
    tables = [_table_rows(group) for group in _group_tables(blocks)]
    order = reading_order([_bounding_box([row.box for row in block]) for block in tables])
    return tuple(_paragraph(tables[index]) for index in order)


def _sort_key(item: tuple[Box, OcrLine]) -> tuple[float | str, ...]:
    """Return a sort key that makes the result independent of the engine's order."""
    box, line = item
    return box.top, box.left, box.right, box.bottom, line.text, line.confidence


def _connected(items: Sequence[_T], linked: Callable[[_T, _T], bool]) -> list[list[_T]]:
    """Return the connected components of items, in the order of the items."""
    group_of = list(range(len(items)))
    for second in range(len(items)):
        for first in range(second):
            if group_of[first] != group_of[second] and linked(items[first], items[second]):
                old, new = sorted((group_of[first], group_of[second]), reverse=True)
                group_of = [new if group == old else group for group in group_of]
    groups: dict[int, list[_T]] = {}
    for group, item in zip(group_of, items, strict=True):
        groups.setdefault(group, []).append(item)
    return list(groups.values())


def _same_baseline(first: Box, second: Box) -> bool:
    return abs(first.middle - second.middle) <= SAME_BASELINE * min(first.height, second.height)


def _same_line(first: Box, second: Box) -> bool:
    gap = max(first.left, second.left) - min(first.right, second.right)
    return _same_baseline(first, second) and gap <= WIDEST_SPACE * (first.height + second.height) / 2


def _paragraph_rows(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Group rows below each other at even distances."""
    distances = {
        (first, second): abs(rows[first].box.middle - rows[second].box.middle)
        for second in range(len(rows))
        for first in range(second)
        if _same_column(rows[first], rows[second])
    }
    nearest = [float("inf")] * len(rows)
    for pair, distance in distances.items():
        for number in pair:
            nearest[number] = min(nearest[number], distance)

    def linked(first: int, second: int) -> bool:
        distance = distances.get((first, second))
        return distance is not None and distance <= EVEN * min(nearest[first], nearest[second])

    return [[rows[number] for number in group] for group in _connected(range(len(rows)), linked)]


def _same_column(above: _Row, below: _Row) -> bool:
    low, high = sorted((above.height, below.height))
    one, other, mean = above.box, below.box, (low + high) / 2
    distance = abs(other.middle - one.middle) / mean
    if low < SAME_HEIGHT * high or not SAME_BASELINE < distance <= LINE_DISTANCE:
        return False
    shared = min(one.right, other.right) - max(one.left, other.left)
    apart = min(
        abs(one.left - other.left),
        abs(one.right - other.right),
        abs(one.left + one.right - other.left - other.right) / 2,
    )
    return shared >= 0.5 * min(one.width, other.width) and apart <= SAME_EDGE * mean


def _group_tables(blocks: Sequence[Sequence[_Row]]) -> list[list[Sequence[_Row]]]:
    """Group paragraphs that are the columns of one table."""
    boxes = [_bounding_box([row.box for row in block]) for block in blocks]

    def linked(first: int, second: int) -> bool:
        one, other = boxes[first], boxes[second]
        # Cheap test first: of a page's many pairs of paragraphs, few are side by side.
        if max(one.top, other.top) > min(one.bottom, other.bottom):
            return False
        if max(one.left, other.left) < min(one.right, other.right):
            return False
        return _same_table(blocks[first], blocks[second])

    return [[blocks[number] for number in group] for group in _connected(range(len(blocks)), linked)]


def _same_table(first: Sequence[_Row], second: Sequence[_Row]) -> bool:
    few, many = sorted((first, second), key=len)
    widths = [median(row.box.width / row.height for row in block) for block in (few, many)]
    if min(widths) >= NARROW or (len(many) >= PROSE_LINES and widths[1] >= PROSE):
        return False
    paired = sum(any(_same_row(row, mate) for mate in many) for row in few)
    return paired >= PAIRED * len(few)


def _same_row(first: _Row, second: _Row) -> bool:
    low, high = sorted((first.height, second.height))
    return low >= SAME_ROW_HEIGHT * high and abs(first.box.middle - second.box.middle) <= SAME_BASELINE * low


def _table_rows(blocks: Sequence[Sequence[_Row]]) -> list[_Row]:
    """Return the rows of one paragraph, or of several side by side joined row by row."""
    rows = sorted((row for block in blocks for row in block), key=lambda row: (row.box.top, row.box.left))
    if len(blocks) == 1:
        return rows
    joined = [_row([piece for row in group for piece in row.pieces]) for group in _connected(rows, _same_row)]
    return _by_top(joined)


def _by_top(rows: Sequence[_Row]) -> list[_Row]:
    return sorted(rows, key=lambda row: (row.box.middle, row.box.left))


def _row(pieces: Sequence[tuple[Box, OcrLine]]) -> _Row:
    in_order = tuple(sorted(pieces, key=lambda piece: (piece[0].left, *_sort_key(piece))))
    boxes = [box for box, _ in in_order]
    return _Row(in_order, _bounding_box(boxes), median(box.height for box in boxes))


def _bounding_box(boxes: Sequence[Box]) -> Box:
    return reduce(or_, boxes)


def _paragraph(rows: Sequence[_Row]) -> Paragraph:
    lines = tuple(line for row in rows for _, line in row.pieces)
    return Paragraph(" ".join(line.text for line in lines), lines)
