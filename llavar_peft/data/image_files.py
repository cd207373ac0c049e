"""Open images without losing text in them.

Three things differ from the original, which loses text there: EXIF rotation is applied, grey of more than 8 bits is
scaled instead of clipped, and transparent areas become white, or black behind a bright drawing. For all other files the
pixels are the original's.
"""

from __future__ import annotations

import importlib.util
import re
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO, Final

import numpy as np
from PIL import Image, UnidentifiedImageError

from llavar_peft.errors import ImageError, LlavarError

MAX_PIXELS: Final = 2**26
"""Larger images (8192 x 8192 pixels, 256 MiB decoded) are rejected: a PNG of 20 kB can decode to gigabytes."""

# Formats for photographs and scans. Others run programs (EPS) or cannot be identified by their first bytes (TGA).
_FORMATS: Final = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "ICO")
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
_START: Final = 256  # bytes of a file by which its kind is recognized
_REASON: Final = 200  # characters of another library's message
_GIVE_IMAGE: Final = "give an image in one of these formats"
_CONVERT: Final = "convert it to PNG or JPEG"
# First bytes of files that are no images, or not of a supported format: what they are, and what to do.
_NOT_IMAGES: Final = (
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer", "run `git lfs pull`"),
    (re.compile(rb"%PDF"), "a PDF document", "save its pages as images, for example with `pdftoppm -r 150 -png`"),
    (re.compile(rb"....ftyp(heic|heix|heim|heis|hevc|mif1|msf1)", re.DOTALL), "a HEIC photograph",
     f"{_CONVERT}, or install support for it with `pip install pillow-heif`"),
    (re.compile(rb"....ftyp(?!avif|avis)|\x1aE\xdf\xa3|RIFF....AVI ", re.DOTALL), "a video", "save a frame of it"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "a PostScript drawing", _CONVERT),
    (re.compile(rb"<(\?xml|svg)", re.IGNORECASE), "an SVG drawing or other XML", _CONVERT),
    (re.compile(rb"<"), "a web page or other markup", "download the image itself"),
)  # fmt: skip
_MOST_MARKERS: Final = 10_000
"""Photographs have up to a few hundred. A million in 4 MB would take Pillow 10 seconds."""
_PLAIN_MARKERS: Final = frozenset((0x00, 0x01, 0xFF, *range(0xD0, 0xDA)))
"""Markers without a length."""
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS: Final = (b"tEXt", b"zTXt", b"iTXt")
_DEPTHS: Final = (1023, 4095, 16383, 65535)
"""Largest values of grey of 10, 12, 14 and 16 bits, all of which are stored in 16 bits."""
_BRIGHT: Final = 200
"""Mean brightness of a drawing on a transparent ground above which the ground becomes black instead of white."""


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
        return _open_file(where)
    except _PngTextError:
        return _checked_bytes(_without_texts(Path(where).read_bytes()), where)


def _open_file(where: str) -> Image.Image:
    try:
        with open(where, "rb") as file:
            _check_markers(file, where)
        opened = Image.open(where, formats=_formats())
    except FileNotFoundError:
        raise ImageError.at(where, "no such file", "give the path of a local image") from None
    except IsADirectoryError:
        raise ImageError.at(where, "is a folder, expected an image", "give the path of a file") from None
    except ImageError:
        raise
    except Exception as error:  # broken files make Pillow raise many types of exceptions
        _raise_for_texts(error)
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
        return _checked_bytes(data, where)
    except _PngTextError:
        return _checked_bytes(_without_texts(data), where)


def _checked_bytes(data: bytes, where: str) -> Image.Image:
    _check_markers(BytesIO(data), where)
    try:
        opened = Image.open(BytesIO(data), formats=_formats())
    except Exception as error:  # broken files make Pillow raise many types of exceptions
        _raise_for_texts(error)
        what, fix = _describe_start(data[:_START])
        raise ImageError.at(where, f"is {what}, expected an image ({', '.join(_formats())})", fix) from error
    with opened:
        return _checked(opened, where)


def _check_markers(file: IO[bytes], where: str) -> None:
    """Reject a JPEG with very many markers before its pixels, each of which Pillow reads and some of which it keeps."""
    if file.read(2) != b"\xff\xd8":
        return
    for _ in range(_MOST_MARKERS):
        marker = file.read(2)
        if len(marker) < 2 or marker == b"\xff\xda":
            return
        if marker[0] != 0xFF or marker[1] in _PLAIN_MARKERS:
            file.seek(-1, 1)  # Pillow looks for the next marker byte by byte
        else:
            file.seek(max(0, int.from_bytes(file.read(2), "big") - 2), 1)
    what = f"the JPEG has more than {_MOST_MARKERS} markers before its pixels"
    raise ImageError.at(where, what, "save the image again, for example as PNG")


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
        _raise_for_texts(error)
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
        rgb = Image.new("RGB", image.size, _ground(coloured))
        rgb.paste(coloured, mask=coloured.getchannel("A"))
    else:
        rgb = image.convert("RGB")  # copies even RGB images, so that the file can be closed
    if orientation in _TURNS:
        rgb = rgb.transpose(_TURNS[orientation])
    rgb.info = {}  # otherwise a remaining orientation tag would rotate it again
    return rgb


def _ground(drawing: Image.Image) -> tuple[int, int, int]:
    """Return the color behind a drawing, so that white text on a transparent ground stays readable."""
    brightness = np.asarray(drawing.convert("L"), dtype=np.float32)
    alpha = np.asarray(drawing.getchannel("A"), dtype=np.float32)
    covered = float(alpha.sum())
    bright = covered > 0 and float((brightness * alpha).sum()) / covered > _BRIGHT
    return (0, 0, 0) if bright else (255, 255, 255)


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


def _unreadable(where: str, error: Exception) -> LlavarError:
    fix = "get the file again, or remove its record"
    if isinstance(error, UnidentifiedImageError):
        kind, fix = _describe_file(where)
        what = f"is {kind}, expected an image ({', '.join(_formats())})"
    elif isinstance(error, PermissionError):
        what = "cannot be read (permission denied)"
    else:
        what = f"cannot be read as an image ({type(error).__name__}: {str(error)[:_REASON]})"
    return ImageError.at(where, what, fix)


def _describe_file(where: str) -> tuple[str, str]:
    try:
        with open(where, "rb") as file:
            return _describe_start(file.read(_START))
    except OSError:
        return "not an image", _GIVE_IMAGE


def _describe_start(start: bytes) -> tuple[str, str]:
    """Return what a file is whose first bytes are not those of an image, and what to do."""
    start = start.lstrip()
    if not start:
        return "an empty file", "get the file again, or remove its record"
    found = ((name, fix) for pattern, name, fix in _NOT_IMAGES if pattern.match(start))
    return next(found, ("not an image", _GIVE_IMAGE))


class _PngTextError(Exception):
    """Pillow refuses a PNG because of its texts, which the pixels do not depend on."""


def _raise_for_texts(error: Exception) -> None:
    """Raise ``_PngTextError`` for Pillow's limits on the texts of a PNG (``PngImagePlugin.MAX_TEXT_CHUNK``)."""
    if "MAX_TEXT" in str(error):
        raise _PngTextError from error


def _without_texts(data: bytes) -> bytes:
    """Return a PNG without its texts, such as a workflow or XMP, which may be larger than Pillow accepts."""
    kept, position = [data[: len(_PNG)]], len(_PNG)
    while position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        end = position + 12 + length
        if data[position + 4 : position + 8] not in _PNG_TEXTS:
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()  # lists the formats that this Pillow was built with
    if importlib.util.find_spec("pillow_heif") is not None:
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
