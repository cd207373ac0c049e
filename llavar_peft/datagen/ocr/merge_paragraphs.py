"""Merge lines into paragraphs and tables, by geometry and by where the numbers are.

Three steps, none of which depends on the order of the lines: pieces on one baseline with a small gap, which is not part
of a gutter between columns, form a row; rows below each other with similar height in one column form a paragraph;
paragraphs side by side whose rows align form a table, unless they are columns of prose. The rows of a table stay lines.
All limits are multiples of the line height, so that moving or scaling a page changes nothing.

Source: arXiv 2306.17107 states that paragraphs were merged by geometry, but not how; these rules are our own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from statistics import median
from typing import Final, TypeVar

from llavar_peft.datagen.ocr.column_gutters import abreast, level, narrow_gutters, separates, wide_gutters
from llavar_peft.datagen.ocr.ocr_lines import OcrLine
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
"""Width, in heights, from which ``PROSE_LINES`` rows that fill their column are prose and not cells."""
PROSE_LINES: Final = 3
FULL: Final = 0.75
"""Minimum median of the widths of such rows as a fraction of the widest."""
LABELS: Final = 0.55
"""Maximum width of labels as a fraction of the width of what they label, to their right."""
NUMBERS: Final = 2 / 3
"""Minimum fraction of the rows of a list that end with a number, as on a receipt."""

_NUMBER: Final = re.compile(r"(?<!\w)\d[\d.,:/-]*\s?\W?$")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Lines that form one paragraph or table, in reading order; in ``text``, rows of a table are lines."""

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
    gutters = narrow_gutters([box for box, _ in placed], _near, NARROW)
    rows = [_row(group) for group in _connected(placed, lambda a, b: _same_line(a[0], b[0], gutters))]
    rows.sort(key=lambda row: (row.box.top, row.box.left))
    blocks = [_by_top(group) for group in _paragraph_rows(rows)]
    tables = [(_table_rows(group), len(group) > 1) for group in _group_tables(blocks)]
    order = reading_order([_bounding_box([row.box for row in rows]) for rows, _ in tables])
    return tuple(_paragraph(*tables[index]) for index in order)


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


def _same_line(first: Box, second: Box, gutters: Sequence[Box]) -> bool:
    return _near(first, second) and not any(separates(gutter, first, second) for gutter in gutters)


def _near(first: Box, second: Box) -> bool:
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
    prose = [box for box, block in zip(boxes, blocks, strict=True) if _is_prose(block)]
    gutters = wide_gutters(prose, [row.box for block in blocks for row in block])

    def linked(first: int, second: int) -> bool:
        one, other = boxes[first], boxes[second]
        # Cheap tests first: of a page's many pairs of paragraphs, few are side by side.
        if not level(one, other):
            return False
        # Only rows at the same height have to be side by side: a title above may be wider than its column.
        parts = [
            [row.box for row in blocks[number] if level(row.box, beside)]
            for number, beside in ((first, other), (second, one))
        ]
        if not all(parts) or abreast(*map(_bounding_box, parts)):
            return False
        return _same_table(blocks[first], blocks[second]) and not any(
            separates(gutter, one, other) for gutter in gutters
        )

    return [[blocks[number] for number in group] for group in _connected(range(len(blocks)), linked)]


def _same_table(first: Sequence[_Row], second: Sequence[_Row]) -> bool:
    few, many = sorted((first, second), key=len)
    paired = sum(any(_same_row(row, mate) for mate in many) for row in few)
    if paired < PAIRED * len(few) or _is_prose(many):
        return False
    left, right = sorted((first, second), key=lambda block: median(row.box.left for row in block))
    if _lists_numbers(right):
        return True
    widths = [median(row.box.width for row in block) for block in (left, right)]
    heights = median(row.height for block in (left, right) for row in block)
    return min(widths) < NARROW * heights or widths[0] <= LABELS * widths[1]


def _is_prose(block: Sequence[_Row]) -> bool:
    """Return whether rows are wide and fill their column."""
    widths = [row.box.width / row.height for row in block]
    return len(block) >= PROSE_LINES and median(widths) >= PROSE and median(widths) >= FULL * max(widths)


def _lists_numbers(rows: Sequence[_Row]) -> bool:
    """Return whether most rows end with a number, such as an amount."""
    return sum(_NUMBER.search(row.pieces[-1][1].text) is not None for row in rows) >= NUMBERS * len(rows)


def _same_row(first: _Row, second: _Row) -> bool:
    low, high = sorted((first.height, second.height))
    return low >= SAME_ROW_HEIGHT * high and abs(first.box.middle - second.box.middle) <= SAME_BASELINE * low


def _table_rows(blocks: Sequence[Sequence[_Row]]) -> list[_Row]:
    """Return the rows of one paragraph, or of several side by side, joined row by row."""
    rows = sorted((row for block in blocks for row in block), key=lambda row: (row.box.top, row.box.left))
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


def _paragraph(rows: Sequence[_Row], is_table: bool) -> Paragraph:
    lines = tuple(line for row in rows for _, line in row.pieces)
    texts = [" ".join(line.text for _, line in row.pieces) for row in rows]
    return Paragraph(("\n" if is_table or _lists_numbers(rows) else " ").join(texts), lines)
