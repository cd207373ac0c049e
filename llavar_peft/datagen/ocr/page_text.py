"""The text that a page of a PDF document has itself, as lines of an OCR engine, where it can be trusted.

It is exact and takes no reading, but a file may have none (a scan), a part of what is seen (a scan with a stamp), or
characters that are not those seen (a font that does not say which letters its shapes are). Such pages are read as
images.
"""

from __future__ import annotations

import unicodedata
from typing import Final

from llavar_peft.data.pdf_pages import PdfPage
from llavar_peft.datagen.ocr.ocr_lines import OcrLine, Point, letter_count

_FEWEST_LETTERS: Final = 5
_MOST_CHARACTERS: Final = 10_000
"""Pages without lines that have more characters than this had too many to be returned."""
_IMAGE_SHARE: Final = 0.5
_LEAST_ROWS: Final = 0.06
"""From the first share of a page on, an image may contain text: then lines have to cover the second share of the
height. The text that a scanner's program found covers more, and a stamp or a page number less."""
_MOST_UNKNOWN: Final = 0.05
"""Share of characters that are no letters, digits, marks or signs."""
_UNKNOWN: Final = frozenset(("Cc", "Cn", "Co", "Cs"))
_LEAST_LETTERS: Final = 0.4
"""Share of letters and digits, without repeated signs such as the dots of a table of contents."""
_ENOUGH: Final = 100  # letters from which their frequencies tell something
_FREQUENT: Final = frozenset("eainrtos")
_LEAST_FREQUENT: Final = 0.42
"""Share of these letters in Latin text. In English it is 0.64, in Polish 0.53; in letters that were exchanged for
others it is 0.31 on average."""
_LIGATURES: Final = {0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st", 0xFB06: "st"}
_BULLETS: Final = dict.fromkeys((0xF06E, 0xF076, 0xF0A7, 0xF0A8, 0xF0B7, 0xF0D8, 0xF0E0), "\u2022")
"""The signs of a list in Symbol and Wingdings, which word processors write in private characters."""
_DROPPED: Final = dict.fromkeys((0xAD, 0x200B, 0xFEFF))
"""The soft hyphen and characters without a width."""


def lines_of_page(page: PdfPage) -> tuple[tuple[OcrLine, ...], str | None]:
    """Return the lines of a page's own text, in the order of the file, and why they cannot be used.

    Args:
        page: The page, with its text.

    Returns:
        The lines, and None; or no lines, and ``"no text"`` or another reason to read the page as an image.
    """
    lines = tuple(
        OcrLine(clean, _corners(box, run, len(clean)), 1.0)
        for text, box, run in page.lines
        if (clean := " ".join(text.translate({**_LIGATURES, **_BULLETS, **_DROPPED}).split()))
    )
    reason = _why_unusable(page, "".join("".join(line.text.split()) for line in lines))
    return ((), reason) if reason else (lines, None)


def _why_unusable(page: PdfPage, text: str) -> str | None:
    if not text:
        return "more text than a page can show" if page.characters > _MOST_CHARACTERS else "no text"
    unknown = sum(unicodedata.category(one) in _UNKNOWN or one == "\ufffd" for one in text)
    if unknown > _MOST_UNKNOWN * len(text):
        return "unknown characters"
    signs = "".join(
        one for place, one in enumerate(text) if one.isalnum() or one not in text[max(0, place - 3) : place]
    )
    if letter_count(signs) < _LEAST_LETTERS * len(signs):
        return "more signs than letters"
    if letter_count(text) < _FEWEST_LETTERS:
        return "no text"
    latin = [one for one in _without_accents(text) if "a" <= one <= "z"]
    if len(latin) >= _ENOUGH and sum(one in _FREQUENT for one in latin) < _LEAST_FREQUENT * len(latin):
        return "letters that form no words"
    if page.image_share >= _IMAGE_SHARE and _covered_rows(page) < _LEAST_ROWS:
        return "an image with little text on it"
    return None


def _without_accents(text: str) -> str:
    return unicodedata.normalize("NFD", text.lower())


def _covered_rows(page: PdfPage) -> float:
    """Return the share of the page's height that lines of text cover."""
    covered = end = 0.0
    for top, bottom in sorted((max(0.0, box[1]), min(float(page.image.height), box[3])) for _, box, _ in page.lines):
        covered += max(0.0, bottom - max(top, end))
        end = max(end, bottom)
    return covered / page.image.height


def _corners(box: tuple[float, float, float, float], run: float, characters: int) -> tuple[Point, Point, Point, Point]:
    """Return a line's corners, clockwise from the top left in reading direction.

    Args:
        box: Left, top, right and bottom.
        run: How far the line runs down the page.
        characters: Number of characters; a single one has no direction.
    """
    left, top, right, bottom = box
    a, b, c, d = (left, top), (right, top), (right, bottom), (left, bottom)
    if characters > 1 and abs(run) > right - left:
        return (b, c, d, a) if run > 0 else (d, a, b, c)
    return a, b, c, d
