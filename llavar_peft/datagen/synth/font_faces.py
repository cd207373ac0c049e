"""Fonts: packaged ones, so that drawing does not depend on the machine, and optionally those of a user's folder.

A font silently draws an empty box for a letter that it lacks, so every font is checked for all letters beforehand.
The packaged ones are six DejaVu faces for Latin, Greek and Cyrillic (the licence is next to them), subset by
``pyftsubset --no-hinting --layout-features='' --unicodes=U+0020-007E,U+00A0-017F,U+0384-03CE,U+0400-045F,U+0490-0491,
U+2013-2014,U+2018-201E,U+2026,U+20AC,U+2116``. Hints and kerning must not be added: the packaged tiny models were
trained on images drawn without them.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Final

from PIL import ImageFont

from llavar_peft.errors import DataError, LlavarError

FONT_NAMES: Final = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
)
"""The packaged faces."""

CAP_HEIGHT: Final = 0.73
"""Height of a capital letter as a fraction of the font size (DejaVu; 0.66 to 0.74 in most Latin faces)."""

SUFFIXES: Final = (".ttf", ".otf", ".ttc")
_UNIT: Final = 100  # size in pixels at which letters are measured
_COMPARED_SIZE: Final = 40  # pixels at which glyphs are compared
_NO_CHARACTER: Final = "\U0010fffe"  # never assigned: drawn like any letter that a font lacks


@lru_cache(maxsize=len(FONT_NAMES))
def packaged_face(name: str) -> str:
    """Return the file of a packaged face."""
    return str(resources.files("llavar_peft") / "assets" / "fonts" / f"{name}.ttf")


def list_faces(folder: Path | None, alphabet: str) -> tuple[str, ...]:
    """Return the files of fonts that have every letter of an alphabet.

    Args:
        folder: Additional fonts in it and its subfolders; None for the packaged ones alone.
        alphabet: The letters.

    Returns:
        The packaged ones first, then the folder's by name.

    Raises:
        DataError: No font has all letters, or a font or the folder cannot be read.
    """
    packaged = [packaged_face(name) for name in FONT_NAMES]
    given: list[str] = []
    if folder is not None:
        if not folder.is_dir():
            raise DataError.at(str(folder), "is not a folder of fonts", f"use one with {', '.join(SUFFIXES)} files")
        given = [str(path) for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    lacking = {face: missing_letters(face, alphabet) for face in (*packaged, *given)}
    able = tuple(face for face, missing in lacking.items() if not missing)
    if not able:
        nearest, missing = min(lacking.items(), key=lambda pair: len(pair[1]))
        raise DataError.at(
            str(folder or "fonts"),
            f"no font has all letters ({Path(nearest).name} lacks {missing[:20]!r})",
            "use a folder with a font that has them",
        )
    return able


def missing_letters(face: str, alphabet: str) -> str:
    """Return the letters that a font lacks. Raises ``DataError`` if it cannot be read."""
    font = open_face(face, _COMPARED_SIZE)
    empty = _glyph(font, _NO_CHARACTER)
    return "".join(letter for letter in alphabet if _glyph(font, letter) == empty)


@lru_cache(maxsize=512)
def open_face(face: str, size: int) -> ImageFont.FreeTypeFont:
    """Open a font with Pillow's basic layout engine, because the other one is not in every build.

    Args:
        face: The file.
        size: Em in pixels.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return ImageFont.truetype(face, size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise _unreadable(face, error) from error


def text_width(text: str, face: str) -> float:
    """Return a text's advance width in a packaged face, which has no kerning, as a multiple of the font size."""
    return sum(_advance(letter, face) for letter in text) / _UNIT


@lru_cache(maxsize=1 << 12)
def _advance(letter: str, face: str) -> float:
    """Return the advance width, a multiple of 1/64, so that sums are exact."""
    return open_face(face, _UNIT).getlength(letter)


def _glyph(font: ImageFont.FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    try:
        mask = font.getmask(letter)
    except OSError as error:
        raise _unreadable(str(font.path), error) from error
    return mask.size, bytes(mask)


def _unreadable(face: str, error: OSError) -> LlavarError:
    return DataError.at(face, f"cannot be read as a font ({error})", "remove it from the folder")
