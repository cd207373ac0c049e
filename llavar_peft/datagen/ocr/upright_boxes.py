"""Lines stood upright: their boxes in a frame in which the page's text runs from left to right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from llavar_peft.datagen.ocr.ocr_lines import OcrLine, Point

_STEEPEST: Final = math.radians(45)  # beyond it a line runs upwards, and the page does not


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in the upright frame, in pixels; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        """Pixels."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """Pixels."""
        return self.bottom - self.top

    @property
    def middle(self) -> float:
        """The y of its middle."""
        return (self.top + self.bottom) / 2

    def __or__(self, other: Box) -> Box:
        """The smallest box around both."""
        return Box(
            min(self.left, other.left),
            min(self.top, other.top),
            max(self.right, other.right),
            max(self.bottom, other.bottom),
        )


def upright_boxes(lines: Sequence[OcrLine]) -> list[Box]:
    """Turn lines by the page's slant and boxes them.

    Args:
        lines: In any order.

    Returns:
        A box for each line, in the same order. A page that is not slanted keeps its coordinates to the bit.
    """
    slant = _slant(lines)
    cosine, sine = (math.cos(slant), math.sin(slant)) if slant else (1.0, 0.0)
    return [_box([(x * cosine + y * sine, y * cosine - x * sine) for x, y in line.polygon]) for line in lines]


def _box(corners: Sequence[Point]) -> Box:
    """As wide as the line, and as high as its letters: a rest of slant must not make a long line high."""
    first, second, third, fourth = corners
    xs = [x for x, _ in corners]
    middle = (first[1] + second[1] + third[1] + fourth[1]) / 4
    half = (math.dist(first, fourth) + math.dist(second, third)) / 4
    return Box(min(xs), middle - half, max(xs), middle + half)


def _slant(lines: Sequence[OcrLine]) -> float:
    """The median angle of the lines in radians, each weighted by its length; 0 where none runs sideways."""
    weighted = []
    for line in lines:
        (x0, y0), (x1, y1) = line.polygon[0], line.polygon[1]
        angle = math.atan2(y1 - y0, x1 - x0)
        if abs(angle) < _STEEPEST:
            weighted.append((angle, math.hypot(x1 - x0, y1 - y0)))
    weighted.sort()
    half, passed = sum(length for _, length in weighted) / 2, 0.0
    for angle, length in weighted:
        passed += length
        if passed >= half:
            return angle
    return 0.0
