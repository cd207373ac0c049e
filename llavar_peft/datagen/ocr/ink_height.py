"""The height of the letters in a line that OCR found, without the room that an engine leaves around them.

RapidOCR's boxes are 1.2 to 1.8 times as high as the letters, Tesseract's as high as they are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from llavar_peft.datagen.ocr.ocr_lines import OcrLine

_CONTRAST: Final = 0.5
"""Fraction of a line's greatest contrast from which a row of pixels has ink."""
_MOST_PIXELS: Final = 4096  # of a side of a line, which is scaled down beyond


def ink_height(image: Image.Image, line: OcrLine) -> float:
    """Return the height of a line's letters in pixels, at most that of its box.

    It is that of the rows with ink around the middle of the box. On a background with patterns, where every row has
    contrast, it is that of the box.

    Args:
        image: The image that was read.
        line: A line in its pixels.
    """
    first, second, third, fourth = line.polygon
    width = (math.dist(first, second) + math.dist(fourth, third)) / 2
    height = (math.dist(first, fourth) + math.dist(second, third)) / 2
    size = [min(max(1, round(length)), _MOST_PIXELS) for length in (width, height)]
    corners = (*first, *fourth, *third, *second)
    straight = image.convert("L").transform(
        (size[0], size[1]), Image.Transform.QUAD, corners, Image.Resampling.BILINEAR
    )
    pixels_HW = np.asarray(straight, dtype=np.int16)
    contrast_H = pixels_HW.max(axis=1) - pixels_HW.min(axis=1)
    inked_H = contrast_H >= max(1.0, _CONTRAST * float(contrast_H.max()))
    middle = len(inked_H) // 2
    if not inked_H[middle]:
        return height
    top = middle - int(np.argmin(np.append(inked_H[middle::-1], False)))
    bottom = middle + int(np.argmin(np.append(inked_H[middle:], False)))
    return (bottom - top - 1) * height / size[1]
