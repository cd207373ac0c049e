"""Pages of PDF documents as images: ``file.pdf#page=3`` is the third page of ``file.pdf``.

A page is rendered at 200 dpi, with a longer side of 2,048 to 4,096 pixels: more than a model sees of it, and the same
pixels in training, in answers and for OCR. A file whose name ends in ``#page=3`` is itself, and no page of another.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image

from llavar_peft.constants import MOST_PAGES
from llavar_peft.data.pdf_process import SECONDS, PdfCrashError, ask_pdf_process, require_pdf
from llavar_peft.errors import ImageError, LlavarError, count_of

_PAGE: Final = re.compile(r"#page=([\d,-]{1,200})$", re.ASCII)
_PART: Final = re.compile(r"(\d{1,9})(?:(-)(\d{1,9})?)?", re.ASCII)
_BEFORE_HEADER: Final = b"\xef\xbb\xbf \t\r\n\f\0"
_HEADER: Final = b"%PDF-"
_END: Final = b"%%EOF"
_TAIL: Final = 65_536  # bytes in which the end marker is searched: some files are padded, or have a page of HTML behind
_REPAIR: Final = "get the file again, or print it to a new PDF file"


@dataclass(frozen=True, slots=True)
class PdfPage:
    """A page of a document.

    Attributes:
        image: The rendered page, RGB.
        lines: The pieces of its own text: the text, the box in pixels (left, top, right, bottom), and how far it runs
            down the page in pixels; empty if they were not asked for, or if there are too many characters.
        characters: Number of characters of its text, with ``lines`` only.
        image_share: Share of the page that its images cover, with ``lines`` only.
    """

    image: Image.Image
    lines: tuple[tuple[str, tuple[float, float, float, float], float], ...] = ()
    characters: int = 0
    image_share: float = 0.0


@dataclass(frozen=True, slots=True)
class PdfDocument:
    """A document, which is opened by each method.

    Attributes:
        path: Its file; None if it is in memory.
        data: The bytes of the file, without a path.
        where: Its name in error messages.
        seconds: Time of computing for each method.
    """

    path: str | None
    data: bytes
    where: str
    seconds: float = SECONDS

    @classmethod
    def of(cls, source: str | bytes, where: str, seconds: float = SECONDS) -> PdfDocument | None:
        """Return the document in a file or in its bytes; None for a file of another kind, or that cannot be read."""
        path, data = (os.path.abspath(source), b"") if isinstance(source, str) else (None, source)
        return cls(path, data, where, seconds) if starts_as_pdf(_start(source)) else None

    def count(self) -> int:
        """Return the number of pages. Raises ``ImageError``."""
        self._check_end()
        pages = int(self._ask(None)[0]["pages"])
        if pages < 1:
            raise ImageError.at(self.where, "is a PDF document without pages", "remove it, or get the file again")
        return pages

    def number(self, chosen: str | None) -> int:
        """Return the number of the one page that is meant.

        Args:
            chosen: The pages in the name, as ``split_page`` returns them.

        Raises:
            ImageError: Another number of pages is meant.
        """
        if chosen is not None and chosen.isdecimal():
            return int(chosen)
        count = self.count()
        numbers = choose_pages(chosen, count, self.where, count)
        if len(numbers) == 1:
            return numbers[0]
        what = f"is a PDF document of {count} pages" if chosen is None else f"names {len(numbers)} pages"
        name = os.path.basename(split_page(self.where)[0]) or "file.pdf"
        raise ImageError.at(self.where, f"{what}, expected one page", f"write the page's number, as in {name}#page=1")

    def page(self, number: int, *, text: bool = False) -> PdfPage:
        """Render a page.

        Args:
            number: Its number, from 1.
            text: Whether its text is read too.

        Raises:
            ImageError: There is no such page, or the document is encrypted or damaged.
        """
        self._check_end()
        answer, pixels = self._ask(number, text=text)
        image = Image.frombytes("RGB", (answer["width"], answer["height"]), pixels)
        lines = tuple((str(line), tuple(box), float(run)) for line, box, run in answer.get("lines", ()))
        return PdfPage(image, lines, int(answer.get("characters", 0)), float(answer.get("image_share", 0.0)))

    def _ask(self, number: int | None, *, text: bool = False) -> tuple[dict[str, Any], bytes]:
        require_pdf(self.where)
        try:
            answer, pixels = ask_pdf_process(self.path, self.data, number, text=text, seconds=self.seconds)
        except PdfCrashError:
            answer, pixels = {"error": "crashed"}, b""
        if "error" in answer:
            raise self._error(answer["error"], answer.get("detail"), number)
        return answer, pixels

    def _error(self, kind: str, detail: object, number: int | None) -> LlavarError:
        page = "the document" if number is None else f"page {number:,}"
        save = "save it without a password, for example with `qpdf --decrypt --password=... in.pdf out.pdf`"
        what, fix = {
            "encrypted": ("is a PDF document that needs a password", save),
            "security": ("is an encrypted PDF document that is damaged, or of an unsupported kind", save),
            "damaged": ("is a PDF document that is damaged or has no pages", _REPAIR),
            "no_page": (f"has no {page} (it has {detail})", "choose one of its pages"),
            "page": (f"{page} of the PDF document is damaged", _REPAIR),
            "page_size": (
                f"{page} has an unusable size (got {detail} points, expected 1 to 14,400)",
                "print it on a usual size of paper",
            ),
            "crashed": (
                f"{page} of the PDF document cannot be read within {self.seconds:g} s and 3 GB of memory",
                "save the page as a PNG or JPEG image",
            ),
        }.get(kind, (f"{page} of the PDF document cannot be read ({detail})", _REPAIR))
        return ImageError.at(self.where, what, fix)

    def _check_end(self) -> None:
        """Reject a document that was cut off, of which PDFium shows what it finds: empty pages, or fewer."""
        if self.path is None:
            tail = self.data[-_TAIL:]
        else:
            with open(self.path, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
                tail = file.read()
        if _END not in tail:
            raise ImageError.at(self.where, "is a PDF document that was cut off (its end is missing)", _REPAIR)


def starts_as_pdf(start: bytes) -> bool:
    """Return whether a file with these first bytes is a PDF document, whatever its name says."""
    return start.lstrip(_BEFORE_HEADER).startswith(_HEADER)


def _start(source: str | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:256]
    try:
        with open(source, "rb") as file:
            return file.read(256)
    except (OSError, ValueError):
        return b""


def split_page(name: str) -> tuple[str, str | None]:
    """Split a path or URL into the file and the pages of it that are meant; None means no pages in particular."""
    found = _PAGE.search(name)
    return (name, None) if found is None else (name[: found.start()], found[1])


def names_pdf(path: str) -> bool:
    """Return whether a path looks like that of a PDF document or of a page, without opening the file."""
    return "#page=" in path or path[-4:].lower() == ".pdf"


def locate_page(path: str | Path) -> tuple[str, str | None]:
    """Split a path as ``split_page`` does, unless a file has the whole name."""
    whole = str(path)
    file, chosen = split_page(whole)
    return (whole, None) if chosen is None or os.path.lexists(whole) else (file, chosen)


def page_name(file: str, number: int | str) -> str:
    """Return the name of a page, which ``split_page`` splits."""
    return f"{file}#page={number}"


def parse_pages(chosen: str, where: str) -> list[tuple[int, int | None]]:
    """Return the first and the last page of each range in a text such as ``1-3,7``; ``5-`` has no last page.

    Args:
        chosen: The text.
        where: Its place in error messages.

    Raises:
        ImageError: The text names no pages.
    """
    ranges: list[tuple[int, int | None]] = []
    for part in chosen.split(","):
        found = _PART.fullmatch(part.strip())
        first = int(found[1]) if found else 0
        last = None if found is None or (found[2] and not found[3]) else int(found[3] or first)
        if first < 1 or (last is not None and last < first):
            raise ImageError.at(where, f"names no pages (got {chosen[:80]!r})", "write pages as in 1-3,7")
        ranges.append((first, last))
    return ranges


def choose_pages(chosen: str | None, count: int, where: str, most: int = MOST_PAGES) -> list[int]:
    """Return the numbers of the pages that are meant, each once and in the order given.

    Args:
        chosen: As in ``parse_pages``; None for all.
        count: Number of pages of the document.
        where: Its name in error messages.
        most: Largest number of pages.

    Raises:
        ImageError: The text names no pages, a page that does not exist, or too many.
    """
    numbers: dict[int, None] = {}
    for first, last in parse_pages("1-" if chosen is None else chosen, where):
        if first > count or (last or 0) > count:
            got = max(first, last or 0)
            what = f"has {count_of(count, 'page')} (got page {got:,})"
            raise ImageError.at(where, what, "choose pages that it has")
        numbers |= dict.fromkeys(range(first, (last or count) + 1))
    if len(numbers) > most:
        verb = "has" if chosen is None else "is asked for"
        what = f"{verb} {count_of(len(numbers), 'page')} (expected at most {most:,})"
        raise ImageError.at(where, what, f"choose some of them, for example 1-{most}")
    return list(numbers)
