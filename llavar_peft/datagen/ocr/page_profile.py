"""The profile by which an image is read: a scene at the paper's size, or a page at its full size.

A page is paper with many lines, or with small ones, that would be illegible with a short edge of 384 pixels. It is
recognized by the lines that an engine finds at that size, and by the smoothness of what lies between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import numpy as np

from llavar_peft.datagen.ocr.text_regions import Pixels, line_height

if TYPE_CHECKING:
    from PIL.Image import Image

    from llavar_peft.datagen.ocr.ocr_lines import Polygon

Profile: TypeAlias = Literal["scene", "page"]
ProfileChoice: TypeAlias = Literal["auto", "scene", "page", "paper"]

PAPER_EDGE: Final = 384
"""Length of the shorter side in pixels. Source: arXiv 2306.17107, section 3."""
_MANY_LINES: Final = 8  # a poster drawn by us has up to 7
_LARGEST_PRINT: Final = 32.0  # median height of a page's lines in pixels, with a short edge of 384
_SMALL_PRINT: Final = 14.0  # median height there below which few lines make a page: half of it is illegible
_SMOOTH: Final = 12.0  # grey levels; median difference between neighbouring pixels of paper in the light of a lamp


def choose_profile(image: Image, polygons: Sequence[Polygon]) -> Profile:
    """Return the profile of an image.

    Args:
        image: Scaled to a short edge of ``PAPER_EDGE``.
        polygons: The lines found in it.
    """
    if not polygons:
        return "scene"
    corners_N42 = np.array(polygons, dtype=float)
    height = line_height(corners_N42)
    printed = height <= _LARGEST_PRINT if len(polygons) >= _MANY_LINES else height < _SMALL_PRINT
    return "page" if printed and _roughness(image, corners_N42) < _SMOOTH else "scene"


def _roughness(image: Image, corners_N42: Pixels) -> float:
    """Return how rough the background between the lines is: an upper quartile of steps between pixels."""
    grey_HW = np.asarray(image.convert("L"), dtype=np.int16)
    lows_N2 = np.floor(corners_N42.min(axis=1)).astype(int).clip(0)
    highs_N2 = np.ceil(corners_N42.max(axis=1)).astype(int).clip(0)
    between_HW = np.zeros(grey_HW.shape, dtype=bool)
    (left, top), (right, bottom) = lows_N2.min(axis=0), highs_N2.max(axis=0)
    between_HW[top : bottom + 1, left : right + 1] = True
    for (low_x, low_y), (high_x, high_y) in zip(lows_N2, highs_N2, strict=True):
        between_HW[low_y : high_y + 1, low_x : high_x + 1] = False
    steps_HW = np.abs(np.diff(grey_HW, axis=1))
    steps_N = steps_HW[between_HW[:, 1:]]
    return float(np.percentile(steps_N, 75)) if steps_N.size else 0.0
