"""Pixels of lines of text: scaled copies of an image, and lines cut out of it. OpenCV is a dependency of RapidOCR."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

Pixels: TypeAlias = npt.NDArray[Any]

_SQUEEZE: Final = 0.85
"""Width of a long line as a fraction of what was printed: recognition is as much faster, and errs no more often."""
_LONG: Final = 4.0  # multiples of its height from which a line is long
_UPRIGHT: Final = 1.5  # multiples of its width from which a box holds a vertical line


def scale_pixels(pixels_HWC: Pixels, scale: float) -> Pixels:
    """Return a scaled copy of an image."""
    import cv2

    if scale == 1:
        return pixels_HWC
    height, width = (max(1, round(side * scale)) for side in pixels_HWC.shape[:2])
    smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels_HWC, (width, height), interpolation=smooth))


def cut_line(pixels_HWC: Pixels, box_42: Pixels) -> Pixels:
    """Return the pixels in a box, straightened, with a vertical line turned to the left.

    Args:
        pixels_HWC: The image.
        box_42: The four corners, clockwise from the top left.
    """
    import cv2

    first, second, third, fourth = box_42
    width = max(1, int(max(np.linalg.norm(first - second), np.linalg.norm(third - fourth))))
    height = max(1, int(max(np.linalg.norm(first - fourth), np.linalg.norm(second - third))))
    narrow = round(width * _SQUEEZE) if width >= _LONG * height else width
    corners_42 = np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float32)
    to_line = cv2.getPerspectiveTransform(box_42.astype(np.float32), corners_42)
    line_HWC = cv2.warpPerspective(
        pixels_HWC, to_line, (width, height), borderMode=cv2.BORDER_REPLICATE, flags=cv2.INTER_CUBIC
    )
    if narrow != width:
        line_HWC = cv2.resize(line_HWC, (narrow, height), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(np.rot90(line_HWC) if height >= _UPRIGHT * width else line_HWC)


def line_height(boxes_N42: Pixels) -> float:
    """Return the median height of boxes, which is the shorter of their sides, in pixels."""
    sides_N2 = np.linalg.norm(boxes_N42[:, [0, 0]] - boxes_N42[:, [1, 3]], axis=2)
    return float(np.median(sides_N2.min(axis=1)))
