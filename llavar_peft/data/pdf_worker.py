"""The process that reads PDF files for ``pdf_process``, which runs this file as a script.

PDFium is written in C++, is not safe for threads, and gets files that anyone may have made. It therefore runs in a
process of its own, with limits of memory and time: a file that crashes it, or that takes it too long, costs this
process only.

A request is a line of JSON, then as many bytes as its ``size`` says. So is an answer; its bytes are the pixels.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

_DPI = 200
_SHORTEST, _LONGEST = 2048, 4096
_MOST_ENLARGED = 10.0
_LARGEST_PAGE = 14_400.0
_MOST_CHARACTERS = 20_000  # a page of small print has 10,000
_MEMORY = 3 * 2**30
_AHEAD, _BEHIND, _JUMP = 12.0, 1.5, 0.7
"""Distances in heights of a line: a gap within a row of a table or of code is smaller than the first; what is farther
to the left than the second, or farther up or down than the third, is on another line."""
_BREAKS = ("\r", "\n")
_HYPHENS = ("\ufffe", "\x02")
"""What PDFium returns for a hyphen at the end of a line, without a line break."""
_Box = tuple[float, float, float, float]
_SEARCHED = 2**28  # bytes of a document that cannot be opened


class _Rejected(Exception):
    """A document or page that is not read: the kind of its fault, and a figure for the message."""


class _Documents:
    """Opens documents, and keeps the last one that is a file."""

    def __init__(self) -> None:
        self._key: object = None
        self._document: Any = None

    def open(self, path: str | None, data: bytes) -> Any:
        status = os.stat(path) if path is not None else None
        key = (path, status.st_size, status.st_mtime_ns) if status else None
        if key is None or key != self._key:
            if self._document is not None:
                self._document.close()
            self._key, self._document = None, None  # stays so if the new one cannot be opened
            self._document = _open(path, data)
            self._key = key
        return self._document


def _open(path: str | None, data: bytes) -> Any:
    import pypdfium2

    try:
        if path is not None and not _is_utf8(path):
            with open(path, "rb") as file:
                path, data = None, file.read()
        document = pypdfium2.PdfDocument(data if path is None else path)
    except pypdfium2.PdfiumError as error:
        # PDFium's reason may be that of an earlier document: one without pages has none.
        if _mentions_encryption(path, data):
            raise _Rejected("encrypted" if "password" in str(error).lower() else "security") from error
        raise _Rejected("damaged") from error
    with suppress(Exception):  # without it, the fields of forms are not drawn
        document.init_forms()
    return document


def _mentions_encryption(path: str | None, data: bytes) -> bool:
    if path is not None:
        with open(path, "rb") as file:
            data = file.read(_SEARCHED)
    return b"/Encrypt" in data


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _page(document: Any, number: int) -> Any:
    import pypdfium2

    try:
        page = document[number - 1]
        if document.formenv is not None:
            # The text of a page lacks what was typed into its form, until that becomes a part of the page.
            with suppress(pypdfium2.PdfiumError, AttributeError):  # pypdfium2 4 has no flatten
                page.flatten()
                page.close()
                page = document[number - 1]
        width, height = page.get_size()
    except pypdfium2.PdfiumError as error:
        raise _Rejected("page") from error
    if not (1 <= width <= _LARGEST_PAGE and 1 <= height <= _LARGEST_PAGE):
        raise _Rejected("page_size", f"{width:,.7g} x {height:,.7g}")
    return page


def _answer(documents: _Documents, request: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    document = documents.open(request["path"], data)
    count, number = len(document), request["page"]
    if number is None:
        return {"pages": count}, b""
    if not 1 <= number <= count:
        raise _Rejected("no_page", count)
    page = _page(document, number)
    image = page.render(scale=_scale(*page.get_size())).to_pil().convert("RGB")
    answer: dict[str, Any] = {"width": image.width, "height": image.height}
    if request["text"]:
        place = _Placement(page, image.width, image.height)
        answer |= _text(page, place)
    pixels = image.tobytes()
    page.close()
    return answer, pixels


def _scale(width: float, height: float) -> float:
    """Return pixels per point: 200 dpi, within the limits of the longer side."""
    longest = max(width, height)
    return min(max(_DPI / 72, _SHORTEST / longest), _MOST_ENLARGED, _LONGEST / longest)


class _Placement:
    """Converts boxes on a page, in points from its lower left corner, to pixels of the turned and cropped image."""

    def __init__(self, page: Any, width: int, height: int) -> None:
        self._left, self._bottom, self._right, self._top = page.get_bbox()
        self._turn = page.get_rotation() % 360
        self._width, self._height = width, height

    def __call__(self, box: _Box) -> _Box:
        left, bottom, right, top = box
        wide, high = (self._right - self._left) or 1.0, (self._top - self._bottom) or 1.0
        x0, x1 = (left - self._left) / wide, (right - self._left) / wide
        y0, y1 = (self._top - top) / high, (self._top - bottom) / high
        if self._turn == 90:
            x0, y0, x1, y1 = 1 - y1, x0, 1 - y0, x1
        elif self._turn == 180:
            x0, y0, x1, y1 = 1 - x1, 1 - y1, 1 - x0, 1 - y0
        elif self._turn == 270:
            x0, y0, x1, y1 = y0, 1 - x1, y1, 1 - x0
        return x0 * self._width, y0 * self._height, x1 * self._width, y1 * self._height


class _Line:
    """A piece of text that grows character by character.

    The box of a character is that of its font, so that a line without tall letters is as high as the others.
    """

    def __init__(self) -> None:
        self.text = ""
        self.has_space = False
        self._box: _Box = (0.0, 0.0, 0.0, 0.0)
        self._first = self._last = 0.0

    def add(self, character: str, box: _Box) -> bool:
        """Add a character; return False if it belongs to another column or line than those before it."""
        line, middle = self._box, (box[1] + box[3]) / 2
        if not self.text:
            self.text, self._box, self._first, self._last = character, box, middle, middle
            return True
        height = max(1.0, min(line[3] - line[1], line[2] - line[0]), box[3] - box[1])
        ahead, behind, down = box[0] - line[2], line[0] - box[2], max(box[1] - line[3], line[1] - box[3])
        if ahead > _AHEAD * height or behind > _BEHIND * height or down > _JUMP * height:
            return False
        self.text += f" {character}" if self.has_space else character
        self.has_space, self._last = False, middle
        self._box = (min(line[0], box[0]), min(line[1], box[1]), max(line[2], box[2]), max(line[3], box[3]))
        return True

    def as_json(self) -> tuple[str, _Box, float]:
        """Return the text, the box, and how far the text runs down the page."""
        return self.text, self._box, self._last - self._first


def _text(page: Any, place: _Placement) -> dict[str, Any]:
    text_page = page.get_textpage()
    count = text_page.count_chars()
    lines = list(_lines(text_page, count, place)) if count <= _MOST_CHARACTERS else []
    text_page.close()
    return {"lines": lines, "characters": count, "image_share": _share_of_images(page, place)}


def _lines(text_page: Any, count: int, place: _Placement) -> Iterator[tuple[str, _Box, float]]:
    """Yield the pieces of text: the text, the box in pixels, and how far it runs down the page, in pixels."""
    line = _Line()
    for index in range(count):
        character = text_page.get_text_range(index, 1)
        ends = character in _BREAKS
        if not ends and character.isspace():
            line.has_space = True
        elif not ends and character:
            if character in _HYPHENS:
                character, ends = "-", True
            box = place(text_page.get_charbox(index, loose=True))
            if not line.add(character, box):
                yield line.as_json()
                line = _Line()
                line.add(character, box)
        if ends and character and line.text:
            yield line.as_json()
            line = _Line()
    if line.text:
        yield line.as_json()


def _share_of_images(page: Any, place: _Placement) -> float:
    """Return the share of the page that its images cover, of which a scan may have one or many strips."""
    import pypdfium2
    import pypdfium2.raw

    covered = 0.0
    left, top, right, bottom = place(page.get_bbox())
    area = max(1.0, (right - left) * (bottom - top))
    with suppress(pypdfium2.PdfiumError):
        for image in page.get_objects(filter=[pypdfium2.raw.FPDF_PAGEOBJ_IMAGE], max_depth=3):
            bounds = image.get_bounds() if hasattr(image, "get_bounds") else image.get_pos()
            x0, y0, x1, y1 = place(bounds)
            inside = max(0.0, min(x1, right) - max(x0, left)) * max(0.0, min(y1, bottom) - max(y0, top))
            covered += inside / area
    return min(1.0, covered)


def _limit(seconds: float) -> None:
    """End this process after some seconds of computing. C code is not interrupted by anything gentler."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    documents = _Documents()
    while line := requests.readline():
        request = json.loads(line)
        data = requests.read(request["size"])
        _limit(request["seconds"])
        pixels = b""
        try:
            answer, pixels = _answer(documents, request, data)
        except _Rejected as error:
            answer = {"error": error.args[0], "detail": (*error.args, None)[1]}
        except (RuntimeError, ValueError, TypeError, OSError, MemoryError, ArithmeticError) as error:
            answer = {"error": "failed", "detail": f"{type(error).__name__}: {str(error)[:200]}"}
        _limit(0)
        answers.write(json.dumps({**answer, "size": len(pixels)}).encode() + b"\n" + pixels)
        answers.flush()


def _main() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints gets among the answers
    _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    _main()
