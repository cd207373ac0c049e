"""Fonts: the packaged ones, so that drawing does not depend on the machine, and those of a folder of the user's.

What a font cannot write it draws as an empty box, without a word; so each is asked for every letter beforehand.
The packaged ones are six DejaVu faces, licence beside them, for Latin, Greek and Cyrillic, cut down by
``pyftsubset --no-hinting --layout-features='' --unicodes=U+0020-007E,U+00A0-017F,U+0384-03CE,U+0400-045F,U+0490-0491,
U+2013-2014,U+2018-201E,U+2026,U+20AC,U+2116``. Their hints and kerning must stay away: the shipped tiny parts have
learnt from what they draw.
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
"""Height of a capital letter, as a share of the font size (DejaVu; most Latin faces lie between 0.66 and 0.74)."""

SUFFIXES: Final = (".ttf", ".otf", ".ttc")
_UNIT: Final = 100  # size in pixels at which letters are measured
_SMALLEST_ASKED: Final = 40  # pixels at which two glyphs are told apart
_NO_CHARACTER: Final = "\U0010fffe"  # never assigned: what a font draws for it, it draws for all that it lacks


@lru_cache(maxsize=len(FONT_NAMES))
def packaged_face(name: str) -> str:
    """The file of a packaged face."""
    return str(resources.files("llavar_peft") / "assets" / "fonts" / f"{name}.ttf")


def list_faces(folder: Path | None, alphabet: str) -> tuple[str, ...]:
    """Find fonts that can write every letter of an alphabet.

    Args:
        folder: Of further fonts, searched with all below it; None for the packaged ones alone.
        alphabet: The letters.

    Returns:
        Files, the packaged ones first, then the folder's by name.

    Raises:
        DataError: None can, or a font or the folder cannot be read.
    """
    packaged = [packaged_face(name) for name in FONT_NAMES]
    given: list[str] = []
    if folder is not None:
        if not folder.is_dir():
            raise DataError.at(str(folder), "is not a folder of fonts", f"give one with {', '.join(SUFFIXES)} files")
        given = [str(path) for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
    lacking = {face: missing_letters(face, alphabet) for face in (*packaged, *given)}
    able = tuple(face for face, missing in lacking.items() if not missing)
    if not able:
        nearest, missing = min(lacking.items(), key=lambda pair: len(pair[1]))
        raise DataError.at(
            str(folder or "fonts"),
            f"no font has all letters ({Path(nearest).name} lacks {missing[:20]!r})",
            "give a folder with a font that does",
        )
    return able


def missing_letters(face: str, alphabet: str) -> str:
    """The letters that a font cannot write. Raises ``DataError``: the font cannot be read."""
    font = open_face(face, _SMALLEST_ASKED)
    empty = _drawn(font, _NO_CHARACTER)
    return "".join(letter for letter in alphabet if _drawn(font, letter) == empty)


@lru_cache(maxsize=512)
def open_face(face: str, size: int) -> ImageFont.FreeTypeFont:
    """Open a font.

    Args:
        face: Its file.
        size: Em in pixels.

    Returns:
        The font; laid out by Pillow's own engine, since the other one is not in every build.

    Raises:
        DataError: It cannot be read.
    """
    try:
        return ImageFont.truetype(face, size, layout_engine=ImageFont.Layout.BASIC)
    except OSError as error:
        raise _unreadable(face, error) from error


def text_width(text: str, face: str) -> float:
    """A text's advance width in a packaged face, which has no kerning, as a multiple of the font size."""
    return sum(_advance(letter, face) for letter in text) / _UNIT


@lru_cache(maxsize=1 << 12)
def _advance(letter: str, face: str) -> float:
    """In 64ths of a pixel, so that sums of it are exact."""
    return open_face(face, _UNIT).getlength(letter)


def _drawn(font: ImageFont.FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    try:
        mask = font.getmask(letter)
    except OSError as error:
        raise _unreadable(str(font.path), error) from error
    return mask.size, bytes(mask)


def _unreadable(face: str, error: OSError) -> LlavarError:
    return DataError.at(face, f"cannot be read as a font ({error})", "take it out of the folder")
