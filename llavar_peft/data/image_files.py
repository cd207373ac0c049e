"""Open images without losing text in them.

Three things differ from the original, which loses text there: EXIF rotation is applied, 16-bit grey is scaled instead
of clipped, and transparent areas become white. For all other files the pixels are the original's.
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
"""Larger images (8192 x 8192 pixels, 256 MiB decoded) are rejected: a PNG of 20 kB can decode to gigabytes."""

# Formats for photographs and scans. Others run programs (EPS) or cannot be identified by their first bytes (TGA).
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
    """Open an image upright and in RGB, with transparency on white and 16 bits scaled to 8.

    Args:
        source: A local path (URLs are not fetched), or an image to convert.

    Returns:
        A decoded RGB image whose file is closed. An upright RGB image is returned unchanged.

    Raises:
        ImageError: It is missing, broken, not an image, larger than ``MAX_PIXELS``, or has several frames.
    """
    if isinstance(source, Image.Image):
        if type(source) is Image.Image and source.mode == "RGB" and not source.info and source.width * source.height:
            return source
        where = str(getattr(source, "filename", "") or "image")
        return _checked(source, where)
    where = str(source)
    try:
        opened = Image.open(where, formats=_formats())
    except FileNotFoundError:
        raise ImageError.at(where, "no such file", "give the path of a local image") from None
    except IsADirectoryError:
        raise ImageError.at(where, "is a folder, expected an image", "give the path of a file") from None
    except Exception as error:  # broken files make Pillow raise many types of exceptions
        raise _unreadable(where, error) from error
    with opened:
        return _checked(opened, where)


def decode_image(data: bytes, where: str) -> Image.Image:
    """Open an image from the bytes of its file, as ``open_image`` does.

    Args:
        data: The bytes of the file.
        where: Name of the image in error messages.

    Raises:
        ImageError: As in ``open_image``.
    """
    try:
        opened = Image.open(BytesIO(data), formats=_formats())
    except Exception as error:  # broken files make Pillow raise many types of exceptions
        what = f"is not an image ({', '.join(_formats())})" if data else "is empty"
        raise ImageError.at(where, what, "give an image in one of the supported formats") from error
    with opened:
        return _checked(opened, where)


def _checked(image: Image.Image, where: str) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError.at(
            where,
            f"the image is too large (got {width} x {height} = {width * height / 1e6:.0f} megapixels, "
            f"expected at most {MAX_PIXELS / 1e6:.0f})",
            "scale it down",
        )
    if not width or not height:
        raise ImageError.at(where, f"the image has no pixels (got {width} x {height})", "replace or remove it")
    try:
        # An MPO file is one photograph with previews or depth maps; its first frame is the image.
        frames = 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
        if frames == 1:
            return _upright_rgb(image)
    except ImageError:
        raise
    except Exception as error:  # mostly OSError, but also IndexError, TypeError, SyntaxError, ...
        raise _unreadable(where, error) from error
    raise ImageError.at(
        where,
        f"the file is an animation or document (got {frames} frames, expected 1)",
        "save the frame that you need as a file",
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
        rgb = image.convert("RGB")  # copies even RGB images, so that the file can be closed
    if orientation in _TURNS:
        rgb = rgb.transpose(_TURNS[orientation])
    rgb.info = {}  # otherwise a remaining orientation tag would rotate it again
    return rgb


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8. Damaged EXIF data counts as upright."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - struct, int and Pillow raise various exceptions
        return 1


def _eight_bits(values_HW: np.ndarray) -> np.ndarray:
    """Scale grey values of any depth to uint8 ``[H, W]`` by the range of 8 or 16 bits, or by their own beyond it."""
    values: np.ndarray = values_HW.astype(np.float32 if values_HW.dtype.itemsize == 2 else np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(low + high):
        raise ValueError("some values are not finite")
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
        what = f"is {_describe_file(where)}, expected an image ({', '.join(_formats())})"
    elif isinstance(error, PermissionError):
        what = "cannot be read (permission denied)"
    else:
        what = f"cannot be read as an image ({type(error).__name__}: {error})"
    return ImageError.at(where, what, "get the file again, or remove its record")


def _describe_file(where: str) -> str:
    try:
        with open(where, "rb") as file:
            start = file.read(256).lstrip()
    except OSError:
        return "not an image"
    if not start:
        return "an empty file"
    return next((name for prefix, name in _NOT_IMAGES if start.startswith(prefix)), "not an image")


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()  # lists the formats that this Pillow was built with
    return tuple(name for name in _FORMATS if name in Image.OPEN)
