"""Embed images in a page as small ``data:`` addresses."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llavar_peft.data.image_files import open_image
from llavar_peft.data.pdf_pages import locate_page, page_name
from llavar_peft.errors import ImageError, MissingDependencyError

LONGEST_SIDE = 360
"""Maximum side in pixels; larger images are scaled down."""
_JPEG_QUALITY = 80


@dataclass(frozen=True, slots=True)
class InlineImage:
    """An image for a page, with its size there in pixels."""

    uri: str
    width: int
    height: int


def image_key(stage_folder: Path, image: str) -> str:
    """Return a key that is the same for equal images in different stage folders; empty if there is no such file."""
    path = _inside(stage_folder, image)
    if path is None:
        return ""
    file, page = locate_page(path)
    digest = hashlib.sha256(Path(file).read_bytes())
    digest.update((page or "").encode())
    return digest.hexdigest()


def embed_image(stage_folder: Path, image: str) -> InlineImage | None:
    """Return an image file for a page; None if it is missing or cannot be opened.

    Args:
        stage_folder: The folder that ``image`` is relative to and must not leave.
        image: Path of the image.
    """
    path = _inside(stage_folder, image)
    if path is None:
        return None
    try:
        small = open_image(path)  # nothing that the readers of records reject is decoded for a page
    except (ImageError, MissingDependencyError):
        return None
    return embed_pixels(small)


def embed_pixels(image: Image.Image) -> InlineImage:
    """Return an image as PNG or JPEG, whichever is smaller, at most ``LONGEST_SIDE`` pixels long."""
    small = image.copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    png, jpeg = io.BytesIO(), io.BytesIO()
    small.save(png, "PNG", optimize=True)
    small.save(jpeg, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    kind, data = min((("png", png.getvalue()), ("jpeg", jpeg.getvalue())), key=lambda pair: len(pair[1]))
    scale = max(1, min(3, LONGEST_SIDE // max(small.size)))
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return InlineImage(uri, small.width * scale, small.height * scale)


def _inside(folder: Path, image: str) -> Path | None:
    try:
        file, page = locate_page(folder / image)
        path = Path(file).resolve()
        inside = path.is_relative_to(folder.resolve()) and path.is_file()
        return path.with_name(page_name(path.name, page)) if inside and page else path if inside else None
    except (OSError, ValueError):
        return None
