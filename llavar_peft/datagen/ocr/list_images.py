"""The images in a folder and its subfolders, and the pages of the PDF documents in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.pdf_pages import PdfDocument, page_name, parse_pages
from llavar_peft.errors import ImageError

SUFFIXES: Final = frozenset(
    (
        ".png", ".jpg", ".jpeg", ".jpe", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif",
        ".mpo", ".heic", ".heif", ".hif", ".pdf",
    )
)  # fmt: skip
MOST_PAGES_READ: Final = 1000
"""Pages of a PDF document that become records, unless another limit is set."""
_OTHERS_SHOWN: Final = 5


@dataclass(frozen=True)
class Folder:
    """Contents of a folder of images.

    Attributes:
        images: Files with an image's extension, as sorted POSIX paths within the folder.
        unnameable: Such files whose names are not Unicode, so that no record can name them, in an escaped form.
        others: Number of all other files.
        some_others: The names of some of them, without hidden ones.
        cut: PDF documents with more pages than the limit, with a text about those that are left out.
    """

    images: tuple[str, ...]
    unnameable: tuple[str, ...]
    others: int
    some_others: tuple[str, ...] = ()
    cut: tuple[tuple[str, str], ...] = ()


def list_folder(folder: Path, pages: str | None = None, most_pages: int = MOST_PAGES_READ) -> Folder:
    """List the images in a folder and its subfolders by extension, without hidden ones.

    Args:
        folder: The folder.
        pages: The pages of each PDF document, as in ``parse_pages``, if it has them; None for all.
        most_pages: Largest number of pages of each document; the rest is left out.

    Raises:
        ImageError: The folder does not exist, or ``pages`` names no pages.
        MissingDependencyError: There is a PDF document, and pypdfium2 is not installed.
    """
    if pages is not None:
        parse_pages(pages, "pages")
    ImageRoots(folder)
    found, unnameable, others, some_others = list[str](), list[str](), 0, list[str]()
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = (Path(parent) / name).relative_to(folder).as_posix()
            if Path(name).suffix.lower() not in SUFFIXES or name.startswith("."):
                others += 1
                if len(some_others) < _OTHERS_SHOWN and not name.startswith("."):
                    some_others.append(ascii(path)[1:-1])
            elif any("\ud800" <= character <= "\udfff" for character in path):
                unnameable.append(path.encode(errors="backslashreplace").decode())
            else:
                found.append(path)
    listed, cut = list[str](), list[tuple[str, str]]()
    for path in sorted(found):
        shown, left_out = _list_pages(folder, path, pages, most_pages)
        listed += shown
        cut += [(path, left_out)] if left_out else []
    return Folder(tuple(listed), tuple(sorted(unnameable)), others, tuple(sorted(some_others)), tuple(cut))


def _list_pages(folder: Path, path: str, pages: str | None, most: int) -> tuple[list[str], str]:
    """Return the names of a document's pages, or the path of another file, and which pages are left out."""
    document = PdfDocument.of(str(folder / path), path) if path[-4:].lower() == ".pdf" else None
    if document is None:
        return [path], ""
    try:
        count = document.count()
    except ImageError:
        return [path], ""  # reading it fails in the same way, and is reported
    ranges = parse_pages(pages or "1-", path)
    numbers = dict.fromkeys(one for first, last in ranges for one in range(first, min(last or count, count) + 1))
    listed = list(numbers)[:most]
    left_out = f"{len(numbers) - most:,} of {count:,} pages; the limit is {most:,}" if len(numbers) > most else ""
    return [page_name(path, number) for number in listed], left_out
