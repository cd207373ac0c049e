"""Images small enough to stand inside the page."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

LONGEST_SIDE = 360
"""Pixels; larger images are brought down to it."""
_JPEG_QUALITY = 80


@dataclass(frozen=True, slots=True)
class InlineImage:
    """An image ready to show; ``width`` and ``height`` are the pixels that it takes on the page."""

    uri: str
    width: int
    height: int


def image_key(stage_folder: Path, image: str) -> str:
    """Return the same key for the same image, in whichever stage's folder it lies."""
    path = _inside(stage_folder, image)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""


def embed_image(stage_folder: Path, image: str) -> InlineImage | None:
    """Return an image as a ``data:`` address, as PNG or JPEG, whichever is smaller.

    Args:
        stage_folder: The folder that ``image`` is relative to and may not lead out of.
        image: The path as the probe wrote it.

    Returns:
        The image, or None where it is missing or cannot be opened.
    """
    path = _inside(stage_folder, image)
    if path is None:
        return None
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            small = _on_white(upright)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    png, jpeg = io.BytesIO(), io.BytesIO()
    small.save(png, "PNG", optimize=True)
    small.save(jpeg, "JPEG", quality=_JPEG_QUALITY, optimize=True)
    kind, data = min((("png", png.getvalue()), ("jpeg", jpeg.getvalue())), key=lambda pair: len(pair[1]))
    grow = max(1, min(3, LONGEST_SIDE // max(small.size)))
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return InlineImage(uri, small.width * grow, small.height * grow)


def _inside(folder: Path, image: str) -> Path | None:
    try:
        path = (folder / image).resolve()
        return path if path.is_relative_to(folder.resolve()) and path.is_file() else None
    except (OSError, ValueError):
        return None


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in {"RGBA", "LA", "PA"} or "transparency" in image.info:
        clear = image.convert("RGBA")
        ground = Image.new("RGBA", clear.size, "white")
        return Image.alpha_composite(ground, clear).convert("RGB")
    return image.convert("RGB")
