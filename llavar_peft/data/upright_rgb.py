"""Convert a decoded image of any mode to upright RGB without losing text in it."""

from __future__ import annotations

from typing import Final

import numpy as np
from PIL import Image, ImageFilter

_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION: Final = 0x0112
_DEPTHS: Final = (1023, 4095, 16383, 65535)
"""Largest values of grey of 10, 12, 14 and 16 bits, all of which are stored in 16 bits."""

_GROUNDS: Final = (255, 0, 128)
_CONTRAST: Final = 64  # difference in brightness below which a drawing cannot be told from the ground
_TOLERATED: Final = 0.02  # share of a drawing that may be lost on white before another ground is tried
_STROKE: Final = 7  # pixels; what is farther from the transparent area than half of it does not touch the ground
_SAMPLE: Final = 1024  # pixels of the longer side; larger images are sampled


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return a copy in RGB, with EXIF rotation applied, 16 bits scaled to 8, and a ground behind transparent areas."""
    stores_16_bits = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
    image.load()
    orientation = _orientation(image)
    if stores_16_bits and len(image.getbands()) > 1:
        image = _brighten(image)
    if image.mode.startswith("I") or image.mode == "F":
        rgb = Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, _ground(coloured))
        rgb.paste(coloured, mask=coloured.getchannel("A"))
    else:
        rgb = image.convert("RGB")  # copies even RGB images, so that the file can be closed
    if orientation in _TURNS:
        rgb = rgb.transpose(_TURNS[orientation])
    rgb.info = {}  # otherwise a remaining orientation tag would rotate it again
    return rgb


def _brighten(image: Image.Image) -> Image.Image:
    """Scale colours of 10 to 14 bits in a file of 16 bits, of which Pillow keeps the upper 8, to the whole range."""
    bands = image.split()
    highest = max(int(np.asarray(band).max()) for band in bands)
    largest = next(depth >> 8 for depth in _DEPTHS if highest <= depth >> 8)
    if largest == 255:
        return image
    brighter = Image.merge(
        image.mode, [band.point(lambda value: min(255, round(value * 255 / largest))) for band in bands]
    )
    brighter.info = image.info
    return brighter


def _ground(drawing: Image.Image) -> tuple[int, int, int]:
    """Return the ground on which least of a drawing is lost: white, or black or grey if white text would disappear.

    Only pixels near the transparent area count: black letters in a white box stay readable on any ground.
    """
    scale = min(1.0, _SAMPLE / max(drawing.size))
    size = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
    sample = drawing if scale == 1 else drawing.resize(size, Image.Resampling.NEAREST)
    alpha = sample.getchannel("A")
    near = np.asarray(alpha.filter(ImageFilter.MinFilter(_STROKE))) < 128
    weights = np.where(near, np.asarray(alpha, dtype=np.float64), 0.0)
    if not weights.any():
        return (255, 255, 255)
    brightness = np.asarray(sample.convert("L"), dtype=np.int16)
    lost = [float(weights[np.abs(brightness - ground) < _CONTRAST].sum() / weights.sum()) for ground in _GROUNDS]
    ground = _GROUNDS[0] if lost[0] <= _TOLERATED else _GROUNDS[int(np.argmin(lost))]
    return (ground, ground, ground)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8. Damaged EXIF data counts as upright."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - struct, int and Pillow raise various exceptions
        return 1


def _eight_bits(values_HW: np.ndarray) -> np.ndarray:
    """Scale grey values to uint8 ``[H, W]`` by the range of their depth (8 to 16 bits), or by their own beyond it."""
    values: np.ndarray = values_HW.astype(np.float32 if values_HW.dtype.itemsize == 2 else np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low + high):
        raise ValueError("some values are not finite")
    if low < 0 or high > 65535:
        values = (values - low) * (255 / max(high - low, 1e-300))
    elif high > 255:
        values = values * (255 / next(depth for depth in _DEPTHS if high <= depth))
    elif values_HW.dtype.kind == "f" and high <= 1:
        values = values * 255
    rounded: np.ndarray = np.rint(values).astype(np.uint8)
    return rounded
