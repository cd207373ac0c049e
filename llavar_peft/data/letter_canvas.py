"""Show an image so that its letters have a given height in the prepared image.

The image is placed on a larger square, or a square around its letters is cut out. Preparation scales the square to the
side of the tower's input, and the letters with it. The image itself keeps its pixels as far as any model can use them,
so that a model that sees more of them than the plain one is not limited to what the plain one sees.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

from PIL import Image

from llavar_peft.errors import ConfigError

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the image."""

MOST_SIDES: Final = 8
"""Maximum side of a square as a multiple of the tower's input, beyond which the image is scaled down: a bound on time
and memory that is finer than any grid of tiles."""

PADDING: Final = (122, 116, 104)
"""CLIP's mean colour, with which images are padded in training."""

_MOST_HEIGHTS: Final = 64
_LARGEST_HEIGHT: Final = 1000.0
_SPAN: Final = re.compile(r"(\d+)\s*-\s*(\d+)")


@dataclass(frozen=True, slots=True)
class LetterCanvas:
    """A square that is shown in place of an image: the image on a background, or a part of it.

    Attributes:
        left: Position of the square's left edge in the image in pixels; negative if the square is wider.
        top: Position of its top edge.
        side: Length of its sides in pixels of the image.
        scale: Factor by which the square is scaled down, at most 1.
        colour: Of the background.
    """

    left: int
    top: int
    side: int
    scale: float
    colour: tuple[int, ...]

    def show(self, image: Image.Image) -> Image.Image:
        """Return the square, RGB."""
        side = round(self.side * self.scale)
        canvas = Image.new("RGB", (side, side), self.colour)
        left, top = max(self.left, 0), max(self.top, 0)
        right, bottom = min(self.left + self.side, image.width), min(self.top + self.side, image.height)
        part = image.crop((left, top, right, bottom))
        if self.scale < 1:
            size = (max(1, round(part.width * self.scale)), max(1, round(part.height * self.scale)))
            part = part.resize(size, Image.Resampling.LANCZOS)
        x, y = self.move(left, top)
        canvas.paste(part, (round(x), round(y)))
        return canvas

    def move(self, x: float, y: float) -> tuple[float, float]:
        """Return where a point of the image is in the square."""
        return (x - self.left) * self.scale, (y - self.top) * self.scale


def whole_canvas(
    size: tuple[int, int],
    letters: float,
    height: float,
    side: float,
    *,
    place: tuple[float, float] = (0.5, 0.5),
    colour: tuple[int, ...] = PADDING,
) -> LetterCanvas | None:
    """Return the square around a whole image in which its letters have a height.

    Args:
        size: (width, height) of the image.
        letters: Height of the letters in pixels of the image.
        height: Their height in the prepared square.
        side: Side of the prepared square in pixels.
        place: Position of the image in the square: (0, 0) is the top left, (0.5, 0.5) the centre.
        colour: Of the background.

    Returns:
        None if the letters are lower than ``height`` even where the image fills the square.
    """
    length = round(letters * side / height)
    if length < max(size):
        return None
    left, top = (-round((length - extent) * share) for extent, share in zip(size, place, strict=True))
    return LetterCanvas(left, top, length, _scale(length, side), colour)


def cropped_canvas(
    size: tuple[int, int],
    box: Box,
    letters: float,
    height: float,
    side: float,
    *,
    colour: tuple[int, ...] = PADDING,
) -> LetterCanvas | None:
    """Return a square of the image around a box in which the letters have a height; None if the box does not fit.

    The square stays within the image where it can. The arguments are those of ``whole_canvas``.
    """
    length = round(letters * side / height)
    if box[2] - box[0] > length or box[3] - box[1] > length:
        return None
    starts = []
    for extent, low, high in ((size[0], box[0], box[2]), (size[1], box[1], box[3])):
        centred = round((low + high - length) / 2)
        starts.append(min(max(centred, 0), extent - length) if extent >= length else -((length - extent) // 2))
    return LetterCanvas(starts[0], starts[1], length, _scale(length, side), colour)


def _scale(length: int, side: float) -> float:
    return min(1.0, MOST_SIDES * side / length)


def parse_heights(text: str) -> tuple[float, ...]:
    """Parse heights in pixels, written as a span (``3-19``), a list (``3,5,7.5``) or both; the result is sorted.

    Raises:
        ConfigError: The text is none of these.
    """
    heights: set[float] = set()
    try:
        for part in text.split(","):
            span = _SPAN.fullmatch(part.strip())
            if span and int(span[1]) <= int(span[2]) <= _LARGEST_HEIGHT:
                heights |= set(map(float, range(int(span[1]), int(span[2]) + 1)))
            else:
                heights.add(float(part))
    except ValueError:
        what = f"got {text[:60]!r}, expected pixels as a span or a list"
        raise ConfigError.at("--heights", what, "write e.g. 3-19, or 3,5,7,9") from None
    return check_heights(tuple(sorted(heights)), "--heights")


def check_heights(heights: tuple[float, ...], where: str) -> tuple[float, ...]:
    """Return heights of letters. Raises ``ConfigError`` if there are none or too many, or one is no useful height."""
    wrong = [height for height in heights if not (math.isfinite(height) and 1 <= height <= _LARGEST_HEIGHT)]
    if wrong:
        what = f"got {wrong[0]:g}, expected heights of 1 to {_LARGEST_HEIGHT:g} pixels"
        raise ConfigError.at(where, what, "use e.g. 3-19, the paper's")
    if not 1 <= len(heights) <= _MOST_HEIGHTS:
        raise ConfigError.at(where, f"got {len(heights)} heights, expected 1 to {_MOST_HEIGHTS}", "use e.g. 3-19")
    return heights
