"""Open images without losing text in them.

Three things differ from the original, which loses text there: EXIF rotation is applied, grey of more than 8 bits is
scaled instead of clipped, and transparent areas become white, or black or grey behind a drawing that white would hide.
For all other files the pixels are the original's.
"""

from __future__ import annotations

import importlib.util
import os
import re
import stat
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import IO, Final

from PIL import Image, UnidentifiedImageError

from llavar_peft.constants import MOST_PAGES
from llavar_peft.data.pdf_pages import (
    PdfDocument,
    choose_pages,
    locate_page,
    page_name,
    split_page,
    starts_as_pdf,
)
from llavar_peft.data.upright_rgb import upright_rgb
from llavar_peft.errors import ImageError, LlavarError
from llavar_peft.types import expand_home

MAX_PIXELS: Final = 2**26
"""Larger images (8192 x 8192 pixels, 256 MiB decoded) are rejected: a PNG of 20 kB can decode to gigabytes."""

# Formats for photographs and scans. Others run programs (EPS) or cannot be identified by their first bytes (TGA).
_FORMATS: Final = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "ICO")
_START: Final = 256  # bytes of a file by which its kind is recognized
_REASON: Final = 200  # characters of a path, or of another library's message
_GIVE_IMAGE: Final = "give an image in one of these formats"
_CONVERT: Final = "convert it to PNG or JPEG"
_HEIC: Final = "a HEIC photograph"
# First bytes of files that are no images, or not of a supported format: what they are, and what to do.
_NOT_IMAGES: Final = (
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer", "run `git lfs pull`"),
    (re.compile(rb"%PDF"), "a damaged PDF document", "get the file again"),
    (re.compile(rb"....ftyp(heic|heix|heim|heis|hevc|mif1|msf1)", re.DOTALL), _HEIC,
     f"{_CONVERT}, or install support for it with `pip install pillow-heif`"),
    (re.compile(rb"....ftyp(?!avif|avis)|\x1aE\xdf\xa3|RIFF....AVI ", re.DOTALL), "a video", "save a frame of it"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "a PostScript drawing", _CONVERT),
    (re.compile(rb"<(\?xml|svg)", re.IGNORECASE), "an SVG drawing or other XML", _CONVERT),
    (re.compile(rb"<"), "a web page or other markup", "download the image itself"),
    (re.compile(rb"[{\[]"), "JSON or other text", "download the image itself"),
    (re.compile(rb"data:"), "the text of a data URL", "decode it, and save the image as a file"),
    (re.compile(rb"PK\x03\x04"), "a ZIP archive or an Office document", "save its images or pages as PNG or JPEG"),
    (re.compile(rb"8BPS"), "a Photoshop document", _CONVERT),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "a JPEG XL image", _CONVERT),
    (re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM|....ftypavi[fs]|\0\0\0\x0cjP", re.DOTALL),
     "damaged", "get the file again"),
    (re.compile(rb"II\*\0|MM\0\*"), "damaged, or a camera's raw file", f"get the file again, or {_CONVERT}"),
)  # fmt: skip
_MOST_MARKERS: Final = 10_000
"""Photographs have up to a few hundred. A million in 4 MB would take Pillow 10 seconds."""
_PLAIN_MARKERS: Final = frozenset((0x00, 0x01, 0xFF, *range(0xD0, 0xDA)))
"""Markers without a length."""
_PNG: Final = b"\x89PNG\r\n\x1a\n"
_PNG_REMARKS: Final = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Chunks of a PNG that pixels do not depend on, and that Pillow rejects if they are large."""


def open_image(source: str | Path | Image.Image) -> Image.Image:
    """Open an image upright and in RGB, with transparency on white and 16 bits scaled to 8.

    Args:
        source: A local path (URLs are not fetched), or an image to convert. ``file.pdf#page=3`` is a page of a PDF
            document.

    Returns:
        A decoded RGB image whose file is closed. An upright RGB image is returned unchanged.

    Raises:
        ImageError: It is missing, broken, not an image, larger than ``MAX_PIXELS``, or has several frames or pages.
        MissingDependencyError: It is a PDF document, and pypdfium2 is not installed.
    """
    if isinstance(source, Image.Image):
        if type(source) is Image.Image and source.mode == "RGB" and not source.info and source.width * source.height:
            return source
        where = str(getattr(source, "filename", "") or "image")
        try:
            return _checked(source, where)
        except ImageError:
            raise
        except Exception as error:  # mostly OSError, but also IndexError, TypeError, SyntaxError, ...
            raise _unreadable(b"", where, error) from error
    file, page = locate_page(expand_home(source))
    return _decode(file, _shortened(str(source)), page)


def decode_image(data: bytes, where: str, page: str | None = None) -> Image.Image:
    """Open an image from the bytes of its file, as ``open_image`` does.

    Args:
        data: The bytes of the file.
        where: Name of the image in error messages.
        page: Number of the page of a PDF document; None for its only one.

    Raises:
        ImageError: As in ``open_image``.
    """
    return _decode(data, where, page)


def open_images(
    source: str | Path | bytes, where: str = "", *, pages: str | None = None, most: int = MOST_PAGES
) -> dict[str, Image.Image]:
    """Open an image, or pages of a PDF document, as ``open_image`` does.

    Args:
        source: A local path, or the bytes of a file.
        where: Name of the image, also in error messages; empty for the path. It may end in ``#page=1-3,7``.
        pages: Pages of the document, as in ``choose_pages``; None for those in the name, or all.
        most: Largest number of pages.

    Returns:
        The images by name; that of a page ends in ``#page=`` and its number.

    Raises:
        ImageError: As in ``open_image`` and ``choose_pages``.
    """
    where, file, chosen = where or str(source), source, None
    if isinstance(source, bytes):
        chosen = split_page(where)[1]
    else:
        file, chosen = locate_page(expand_home(source))
    document = PdfDocument.of(file if isinstance(file, bytes) else str(file), _shortened(where))
    if document is None:
        return {where: _decode(file if isinstance(file, bytes) else str(file), _shortened(where), chosen)}
    name = where if chosen is None else split_page(where)[0]
    numbers = choose_pages(pages if chosen is None else chosen, document.count(), document.where, most)
    return {page_name(name, number): document.page(number).image for number in numbers}


def _shortened(where: str) -> str:
    return where if len(where) <= _REASON else f"{where[:_REASON]}..."


def read_header(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Return the image in a file's bytes without decoding it: its size, format and number of frames.

    Args:
        data: The bytes of the file.
        formats: The formats that are accepted, by Pillow's names.

    Raises:
        ImageError: It is a JPEG with very many markers.
        Exception: Any of Pillow's exceptions, if the file is damaged or of another format.
    """
    _check_markers(BytesIO(data), "image")
    try:
        return Image.open(BytesIO(data), formats=formats)
    except Exception as error:
        if not _may_be_remarks(error, data):
            raise
        return Image.open(BytesIO(_without_remarks(data)), formats=formats)


def _decode(source: str | bytes, where: str, page: str | None = None, *, has_remarks: bool = True) -> Image.Image:
    try:
        if isinstance(source, str) and not stat.S_ISREG(mode := os.stat(source).st_mode) and not stat.S_ISDIR(mode):
            raise ImageError.at(where, "is a pipe or a device, expected a file", "save the image as a file")
        with open(source, "rb") if isinstance(source, str) else BytesIO(source) as file:
            _check_markers(file, where)
        if rendered := _render(source, where, page):
            return rendered
        with Image.open(source if isinstance(source, str) else BytesIO(source), formats=_formats()) as opened:
            if opened.format == "JPEG2000":
                _check_end(Path(source).read_bytes() if isinstance(source, str) else source)
            return _checked(opened, where)
    except LlavarError:
        raise
    except FileNotFoundError:
        fix = "download the image, and give its path" if "://" in where else "give the path of a local image"
        raise ImageError.at(where, "no such file", fix) from None
    except IsADirectoryError:
        raise ImageError.at(where, "is a folder, expected an image", "give the path of a file") from None
    except Image.DecompressionBombError as error:  # Pillow's limit is higher than ours
        raise ImageError.at(
            where, f"the image is too large (expected at most {MAX_PIXELS / 1e6:.0f} megapixels)", "scale it down"
        ) from error
    except Exception as error:  # broken files make Pillow raise many types of exceptions
        if has_remarks and _may_be_remarks(error, _start_of(source)):
            data = Path(source).read_bytes() if isinstance(source, str) else source
            return _decode(_without_remarks(data), where, has_remarks=False)
        raise _unreadable(source, where, error) from error


def _render(source: str | bytes, where: str, page: str | None) -> Image.Image | None:
    """Return a page of a PDF document; None if the file is none, and no page is named."""
    if document := PdfDocument.of(source, where):
        return document.page(document.number(page)).image
    if page is not None:
        raise ImageError.at(where, f"names page {page} of a file that is no PDF document", f"leave out #page={page}")
    return None


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


def _check_end(data: bytes) -> None:
    """Reject a JPEG 2000 without its end marker, which no pixels contain; Pillow makes what is missing black."""
    if data.find(b"\xff\xd9", data.find(b"\xff\x4f\xff\x51")) < 0:
        raise OSError("image file is truncated")


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
    # An MPO or HEIC file is one photograph with previews or depth maps; the frame that is open is the image.
    frames = 1 if image.format in ("MPO", "HEIF") else int(getattr(image, "n_frames", 1))
    if frames == 1:
        return upright_rgb(image)
    raise ImageError.at(
        where,
        f"the file is an animation or document (got {frames} frames, expected 1)",
        "save the frame that you need as a file",
    )


def _unreadable(source: str | bytes, where: str, error: Exception) -> LlavarError:
    fix = "get the file again, or remove its record"
    if isinstance(error, UnidentifiedImageError):
        kind, fix = describe_start(_start_of(source))
        what = f"is {kind}, expected an image ({', '.join(_formats())})"
    elif isinstance(error, PermissionError):
        what = "cannot be read (permission denied)"
    else:
        what = f"cannot be read as an image ({type(error).__name__}: {str(error)[:_REASON]})"
    return ImageError.at(where, what, fix)


def _start_of(source: str | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:_START]
    try:
        with open(source, "rb") as file:
            return file.read(_START)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return b"unreadable"


def describe_start(start: bytes) -> tuple[str, str]:
    """Return what a file is whose first bytes are not those of an image, and what to do."""
    start = start.lstrip()
    if not start:
        return "an empty file", "get the file again, or remove its record"
    name, fix = next(
        ((name, fix) for pattern, name, fix in _NOT_IMAGES if pattern.match(start)), ("not an image", _GIVE_IMAGE)
    )
    return ("a damaged HEIC photograph", "get the file again") if name == _HEIC and reads_heic() else (name, fix)


def reads_heic() -> bool:
    """Return whether HEIC photographs can be opened, for which pillow-heif has to be installed."""
    return "HEIF" in _formats()


def _may_be_remarks(error: Exception, start: bytes) -> bool:
    """Return whether Pillow may reject a PNG because of its remarks: one is damaged, or they are large."""
    return "MAX_TEXT" in str(error) or (isinstance(error, UnidentifiedImageError) and start.startswith(_PNG))


def _without_remarks(data: bytes) -> bytes:
    """Return a PNG without its texts, such as a workflow or XMP, and without its colour profile."""
    kept, position = [data[: len(_PNG)]], len(_PNG)
    while position + 8 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        end = position + 12 + length
        if data[position + 4 : position + 8] not in _PNG_REMARKS:
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()  # lists the formats that this Pillow was built with
    if importlib.util.find_spec("pillow_heif") is not None:
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def image_suffix(data: bytes, where: str) -> str:
    """Return the extension that an image's file has, by its bytes; nothing is decoded.

    Args:
        data: The bytes of the file.
        where: Name of the image in error messages.

    Raises:
        ImageError: It is no image of a supported format.
    """
    if starts_as_pdf(data[:_START]):
        return ".pdf"
    try:
        with read_header(data, _formats()) as opened:
            form = str(opened.format)
    except ImageError:
        raise
    except Exception as error:
        raise _unreadable(data, where, error) from error
    return {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}.get(form, f".{form.lower()}")
