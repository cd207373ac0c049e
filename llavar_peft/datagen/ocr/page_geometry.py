"""Geometry of a page: boxes of its lines with the slant removed, and the reading order of blocks of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from llavar_peft.datagen.ocr.ocr_lines import OcrLine, Point

if TYPE_CHECKING:
    import numpy.typing as npt

_MAX_SLANT: Final = math.radians(45)  # a steeper line runs upwards on a page that is not slanted
_MAX_BEND: Final = math.radians(8)  # between a line and the page's slant, in a photograph of a page
_ROWS_TO_BEND: Final = 4  # lines from which it is measured
_MIN_OVERLAP: Final = 0.1
"""Fraction of the smaller extent up to which blocks do not count as overlapping, because boxes are never exact."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in the deskewed page, in pixels; y increases downwards."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        """Width in pixels."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """Height in pixels."""
        return self.bottom - self.top

    @property
    def middle(self) -> float:
        """The y coordinate of the centre."""
        return (self.top + self.bottom) / 2

    def __or__(self, other: Box) -> Box:
        return Box(
            min(self.left, other.left),
            min(self.top, other.top),
            max(self.right, other.right),
            max(self.bottom, other.bottom),
        )


def upright_boxes(lines: Sequence[OcrLine]) -> list[Box]:
    """Return a box for each line, in a frame rotated by the page's slant, with rows level in spite of perspective.

    A page without slant keeps its coordinates exactly.
    """
    slant = _estimate_slant(lines)
    cosine, sine = (math.cos(slant), math.sin(slant)) if slant else (1.0, 0.0)
    boxes = [_make_box([(x * cosine + y * sine, y * cosine - x * sine) for x, y in line.polygon]) for line in lines]
    return _level_rows(boxes, [_angle(line) - slant for line in lines])


def _level_rows(boxes: list[Box], angles: Sequence[float]) -> list[Box]:
    """Move boxes up or down so that rows are level, whose slope changes from the top to the bottom of the page.

    Args:
        boxes: Boxes of lines.
        angles: The lines' angles in radians; those of vertical lines are not used.
    """
    level = [number for number, angle in enumerate(angles) if abs(angle) < _MAX_BEND]
    if len(level) < _ROWS_TO_BEND or not any(angles[number] for number in level):
        return boxes
    middles_N, angles_N = np.array([(boxes[n].middle, angles[n]) for n in level]).T
    lengths_N = np.array([boxes[n].width for n in level])  # the longer a line, the more exact its angle
    trend = np.polynomial.Polynomial.fit(middles_N, angles_N, 1, w=lengths_N)
    low, high = middles_N.min(), middles_N.max()
    centre = float(np.median([box.left + box.width / 2 for box in boxes]))
    moved = []
    for box in boxes:
        slope = float(trend(min(max(box.middle, low), high)))
        shift = slope * (box.left + box.width / 2 - centre)
        moved.append(Box(box.left, box.top - shift, box.right, box.bottom - shift))
    return moved


def _make_box(corners: Sequence[Point]) -> Box:
    """Return a box as high as the letters, because a residual slant must not add height to a long line."""
    first, second, third, fourth = corners
    xs = [x for x, _ in corners]
    middle = (first[1] + second[1] + third[1] + fourth[1]) / 4
    half = (math.dist(first, fourth) + math.dist(second, third)) / 4
    return Box(min(xs), middle - half, max(xs), middle + half)


def _angle(line: OcrLine) -> float:
    (x0, y0), (x1, y1) = line.polygon[0], line.polygon[1]
    return math.atan2(y1 - y0, x1 - x0)


def _estimate_slant(lines: Sequence[OcrLine]) -> float:
    """Return the median angle of the horizontal lines in radians, weighted by length; 0 if there are none."""
    weighted = []
    for line in lines:
        angle = _angle(line)
        if abs(angle) < _MAX_SLANT:
            weighted.append((angle, math.dist(line.polygon[0], line.polygon[1])))
    weighted.sort()
    half, passed = sum(length for _, length in weighted) / 2, 0.0
    for angle, length in weighted:
        passed += length
        if passed >= half:
            return angle
    return 0.0


def reading_order(boxes: Sequence[Box]) -> list[int]:
    """Return the indices of blocks of text in reading order.

    Of two blocks one above the other, the upper one comes first. Of two side by side, the left one comes first, and
    likewise if their columns are side by side, unless a block between them (a heading across both) separates them.
    All others are read from top to bottom.

    Source: after T. Breuel, "High performance document layout analysis", 2003, whose second rule is restricted here
    to columns, since signs and posters have none.
    """
    before = _must_precede(
        np.array([(box.left, box.top, box.right, box.bottom) for box in boxes], float).reshape(-1, 4)
    )
    waiting = set(range(len(boxes)))
    order: list[int] = []
    while waiting:
        # If rules contradict each other, choose the block with the fewest unmet ones, then the upper left one.
        rest = sorted(waiting)
        unmet = before[np.ix_(rest, rest)].sum(axis=0)
        chosen = min(
            zip(unmet, rest, strict=True), key=lambda pair: (pair[0], boxes[pair[1]].top, boxes[pair[1]].left)
        )[1]
        waiting.remove(chosen)
        order.append(chosen)
    return order


def _must_precede(boxes_N4: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return whether the first block must be read before the second, bool ``[N, N]``."""
    left, top, right, bottom = boxes_N4.T
    stacked = _overlap(left, right)
    abreast = _overlap(top, bottom)
    above = (top + bottom)[:, None] < (top + bottom)[None, :]
    leftward = ~stacked & ((left + right)[:, None] < (left + right)[None, :])
    over = stacked & above
    through = _boolean_product(over, over)
    separated = through | through.T
    columns = _boolean_product(stacked, abreast) | _boolean_product(abreast, stacked)
    sideways = leftward & ~separated & (abreast | above | columns)
    downwards = ~stacked & ~abreast & above & ~sideways.T
    return np.asarray(over | sideways | downwards)


def _overlap(low: npt.NDArray[np.float64], high: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """Return whether two extents overlap by more than ``_MIN_OVERLAP``, bool ``[N, N]``."""
    shared = np.minimum(high[:, None], high[None, :]) - np.maximum(low[:, None], low[None, :])
    extent = high - low
    return np.asarray(shared > _MIN_OVERLAP * np.minimum(extent[:, None], extent[None, :]))


def _boolean_product(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return whether some third block is related to both, bool ``[N, N]``."""
    return np.asarray(first.astype(np.float32) @ second.astype(np.float32) > 0)
