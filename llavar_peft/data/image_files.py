"""Opening images so that nothing in them is lost.

Differs from the original on purpose where the original loses text: EXIF rotation is applied, 16-bit grey is scaled
rather than clipped, and transparency is laid on white. On all other files the pixels are the original's.
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, UnidentifiedImageError

from llavar_peft.errors import ImageError, LlavarError

MAX_PIXELS: Final = 2**26
"""Images above 67 megapixels (8192 x 8192) are refused: decoded they take 256 MiB in every worker, and a 20 kB PNG
can ask for gigabytes."""

# Formats that hold photographs and scans. Others run programs (EPS) or have no mark to know them by (TGA).
_FORMATS: Final = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
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
_NOT_IMAGES: Final = ((b"version https://git-lfs", "a Git LFS pointer"), (b"<", "a web page or other markup"))


def open_image(source: str | Path | Image.Image) -> Image.Image:
    """Open an image: upright, RGB, transparency on white, 16 bits scaled to 8.

    Args:
        source: A local path (never fetched from the net), or an image, of which the same is made.

    Returns:
        RGB, decoded, its file closed. An upright RGB image given is handed back as it is.

    Raises:
        ImageError: It is missing, broken, not an image, larger than ``MAX_PIXELS``, or has several frames.
    """
    if isinstance(source, Image.Image):
        if type(source) is Image.Image and source.mode == "RGB" and not source.info and source.width * source.height:
            return source
        where = str(getattr(source, "filename", "") or "picture")
        return _guarded(source, where)
    where = str(source)
    try:
        opened = Image.open(where, formats=_formats())
    except FileNotFoundError:
        raise ImageError.at(where, "no such file", "give the path of a local picture") from None
    except IsADirectoryError:
        raise ImageError.at(where, "is a folder, expected a picture", "give the path of a file") from None
    except Exception as error:  # broken files make Pillow raise nearly anything
        raise _unreadable(where, error) from error
    with opened:
        return _guarded(opened, where)


def decode_image(data: bytes, where: str) -> Image.Image:
    """Open an image that is in memory, as ``open_image`` opens a file.

    Args:
        data: The file's bytes.
        where: What to call it in messages; nothing is looked up by it.

    Returns:
        RGB, decoded.

    Raises:
        ImageError: As ``open_image``.
    """
    try:
        opened = Image.open(BytesIO(data), formats=_formats())
    except Exception as error:  # broken files make Pillow raise nearly anything
        what = f"is not a picture ({', '.join(_formats())})" if data else "is empty"
        raise ImageError.at(where, what, "give a picture") from error
    with opened:
        return _guarded(opened, where)


def _guarded(image: Image.Image, where: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError.at(
            where,
            f"has {width} x {height} = {width * height / 1e6:.0f} megapixels (at most {MAX_PIXELS / 1e6:.0f})",
            "scale it down",
        )
    if not width or not height:
        raise ImageError.at(where, f"has no pixels ({width} x {height})", "replace or remove it")
    try:
        # An MPO is one photograph with previews or depth beside it; its first frame is the image.
        frames = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
        if frames == 1:
            return _upright_rgb(image)
    except ImageError:
        raise
    except Exception as error:  # OSError mostly, but IndexError, TypeError, SyntaxError, ... were seen
        raise _unreadable(where, error) from error
    raise ImageError.at(
        where, f"is an animation or a document of {frames} frames, expected one picture", "save the frame that is meant"
    )


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    orientation = _orientation(image)
    if image.mode.startswith("I") or image.mode == "F":
        rgb = Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        coloured = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, (255, 255, 255))
        rgb.paste(coloured, mask=coloured.getchannel("A"))
    else:
        rgb = image.convert("RGB")  # makes a copy even of RGB, so that the file can be closed
    if orientation in _TURNS:
        rgb = rgb.transpose(_TURNS[orientation])
    rgb.info = {}  # a left-over orientation would turn it again
    return rgb


def _orientation(image: Image.Image) -> int:
    """1 to 8 by EXIF; damaged EXIF must not cost a good image and counts as upright."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - parsing it raises whatever struct, int or Pillow raise
        return 1


def _eight_bits(values_HW: np.ndarray) -> np.ndarray:
    """Grey of any depth as uint8 ``[H, W]``: by its type's range where the values say so, else by their own."""
    values: np.ndarray = values_HW.astype(np.float32 if values_HW.dtype.itemsize == 2 else np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low + high):
        raise ValueError("it holds values that are not finite")
    if low < 0 or high > 65535:
        values = (values - low) * (255 / max(high - low, 1e-300))
    elif high > 255:
        values = values / 257
    elif values_HW.dtype.kind == "f" and high <= 1:
        values = values * 255
    rounded: np.ndarray = np.rint(values).astype(np.uint8)
    return rounded


def _unreadable(where: str, error: Exception) -> LlavarError:
    if isinstance(error, UnidentifiedImageError):
        what = f"is {_what_it_is(where)}, expected a picture ({', '.join(_formats())})"
    elif isinstance(error, PermissionError):
        what = "may not be read (permission denied)"
    else:
        what = f"cannot be read as a picture ({type(error).__name__}: {error})"
    return ImageError.at(where, what, "get the file again, or remove its record")


def _what_it_is(where: str) -> str:
    try:
        with open(where, "rb") as file:
            start = file.read(256).lstrip()
    except OSError:
        return "not a picture"
    if not start:
        return "an empty file"
    return next((name for prefix, name in _NOT_IMAGES if start.startswith(prefix)), "not a picture")


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()  # which of the formats this Pillow was built with
    return tuple(name for name in _FORMATS if name in Image.OPEN)
