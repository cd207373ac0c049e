"""Find the images of records in the image folders, and never outside them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llavar_peft.data.pdf_pages import locate_page, split_page
from llavar_peft.errors import ImageError, LlavarError
from llavar_peft.types import EmbeddedImage, ImageSource, expand_home

if TYPE_CHECKING:
    from PIL import Image

_NAMES_READ: Final = 20_000  # entries of a folder that are searched for a similar name
_LISTED_AFTER: Final = 64  # lookups in a folder after which reading the whole folder is faster


class ImageRoots:
    """The image folders, searched in order.

    Records may come from untrusted sources, so that no path may leave the folders: not as an absolute path, not with
    ``..``, and not through a symbolic link. A folder itself may be a link, and links from one folder to another are
    allowed, as are absolute paths that lead into a folder.

    Args:
        roots: The folders; none for text-only records.

    Raises:
        ImageError: One of them is not a folder.
    """

    def __init__(self, roots: Iterable[str | Path] | str | Path = ()) -> None:
        folders = [roots] if isinstance(roots, str | Path) else roots
        self.roots = tuple(expand_home(folder) for folder in folders)
        for root in self.roots:
            if not root.is_dir():
                raise ImageError.at(
                    str(root), "is not a folder of images", "give the folder that the image paths start from"
                )
        self._real = tuple(os.path.realpath(root) for root in self.roots)

    def __repr__(self) -> str:
        return f"ImageRoots({[str(root) for root in self.roots]})"

    def resolve(self, path: str, *, guess: bool = True) -> Path:
        """Find the file of an image.

        Args:
            path: The path in the record, with ``/``; for a page of a PDF document it ends in ``#page=`` and a number.
            guess: Name a similar file in the message about a missing one, which reads a folder.

        Returns:
            The file in the first folder that contains it, with the page.

        Raises:
            ImageError: No folder contains it, or it is outside the folders.
        """
        if not self.roots:
            raise ImageError.at(path, "no image folder was given", "give the folder that the image paths start from")
        if not path or "\0" in path:
            raise ImageError.at(repr(path), "is not a path", "write the path of the image relative to an image folder")
        for root in self.roots:
            candidate = os.path.join(root, path)
            file, _ = locate_page(candidate)
            if os.path.isfile(file):
                self._check_inside(file, path)
                return Path(candidate)
        # Check this before the message about a missing file, which must not reveal names outside the folders.
        for root in self.roots:
            self._check_inside(locate_page(os.path.join(root, path))[0], path)
        raise self._missing(path, guess=guess)

    def open(self, image: ImageSource) -> Image.Image:
        """Open an image by the path in its record, or from its bytes, upright and in RGB. Raises ``ImageError``."""
        from llavar_peft.data.image_files import decode_image, open_image

        if isinstance(image, EmbeddedImage):
            return decode_image(bytes(image.data), image.name, split_page(image.path or "")[1])
        return open_image(self.resolve(image))

    def opened(self) -> OpenedImages:
        """Return a view of these folders that opens each image once, for the images of one record."""
        return OpenedImages(self)

    def is_inside(self, path: str | Path) -> bool:
        """Return whether a path is in one of the folders after all symbolic links are followed."""
        real = os.path.realpath(path)
        return any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in self._real)

    def leads_outside(self, path: str) -> bool:
        """Return whether the path in a record leaves the folders."""
        if "\0" in path:
            return False  # no path at all, and thus missing
        return not all(self.is_inside(locate_page(os.path.join(root, path))[0]) for root in self.roots)

    def _check_inside(self, candidate: str, path: str) -> None:
        if not self.is_inside(candidate):
            raise ImageError.at(
                path,
                f"leads outside the image folders (to {os.path.realpath(candidate)})",
                "copy the image into one of the folders, or add the folder that contains it",
            )

    def _missing(self, path: str, *, guess: bool) -> LlavarError:
        if any(os.path.isdir(os.path.join(root, path)) for root in self.roots):
            return ImageError.at(path, "is a folder, expected an image", "give the path of a file")
        folders, file = ", ".join(str(root) for root in self.roots), split_page(path)[0]
        what = f"is in none of the image folders (searched {folders})"
        fix = "add the image, correct its path, or add the folder that contains it"
        similar = [name for root in self.roots for name in _similar(root, file)] if guess else []
        if similar:
            fix = f"if {similar[0]} is meant, correct the path; otherwise add the image or the folder that contains it"
        return ImageError.at(path, what, fix)


def _similar(root: Path, path: str) -> Sequence[str]:
    """Find files that may be meant by the path of a missing one: other slashes, case or extension, or a typo."""
    if "\\" in path and (root / path.replace("\\", "/")).is_file():
        return [path.replace("\\", "/")]
    folder, name = os.path.split(path)
    try:
        with os.scandir(root / folder) as entries:
            names = [entry.name for entry in islice(entries, _NAMES_READ)]
    except OSError:
        return []
    stem = os.path.splitext(name)[0].casefold()
    same_stem = [other for other in names if os.path.splitext(other)[0].casefold() == stem]
    similar = same_stem or get_close_matches(name, names[:2000], n=1, cutoff=0.8)
    return [os.path.join(folder, other) for other in sorted(similar)]


class OpenedImages:
    """The images of one record, each opened once: to measure it, and to prepare it.

    Args:
        roots: The image folders.
    """

    def __init__(self, roots: ImageRoots) -> None:
        self._roots = roots
        self._images: dict[ImageSource, Image.Image] = {}

    def open(self, image: ImageSource) -> Image.Image:
        """Open an image as ``ImageRoots.open`` does, or return the one that is open."""
        if image not in self._images:
            self._images[image] = self._roots.open(image)
        return self._images[image]


class FolderListing:
    """Checks whether very many images exist, without opening them.

    A folder with many lookups is read once, which on a network disk is a thousand times as fast as one lookup per
    file. Later changes of the folder are not seen.
    """

    def __init__(self, roots: ImageRoots) -> None:
        self._roots = roots
        self._lookups: dict[str, int] = {}
        self._names: dict[str, frozenset[str]] = {}

    def contains(self, path: str) -> bool:
        """Return whether a path leads to a file in the image folders; False may also mean: ask ``resolve``."""
        folder, _, name = path.rpartition("/")
        names = self._names.get(folder)
        if names is None:
            lookups = self._lookups[folder] = self._lookups.get(folder, 0) + 1
            if lookups <= _LISTED_AFTER:
                return False
            names = self._names[folder] = frozenset(self._list(folder))
        return name in names or split_page(name)[0] in names

    def _list(self, folder: str) -> Iterable[str]:
        for root in self._roots.roots:
            path = os.path.join(root, folder)
            if not self._roots.is_inside(path):
                continue
            try:
                with os.scandir(path) as entries:
                    yield from (entry.name for entry in entries if entry.is_file(follow_symlinks=False))
            except OSError:
                continue
