"""Finding records' images below their roots, and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

from llavar_peft.errors import ImageError, LlavarError

if TYPE_CHECKING:
    from PIL import Image

_NAMES_READ: Final = 20_000  # of a folder, to guess which name was meant
_LISTED_AFTER: Final = 64  # look-ups in a folder, after which reading it whole is cheaper


class ImageRoots:
    """The folders that records' images are looked up in, first match first.

    Records may come from anywhere, so that a path may not leave the roots: not absolutely, not by ``..``, not by a
    symbolic link (a root itself may be one, and links from one root into another are fine).

    Args:
        roots: Folders; none for text-only records.

    Raises:
        ImageError: One of them is not a folder.
    """

    def __init__(self, roots: Iterable[str | Path] | str | Path = ()) -> None:
        given = [roots] if isinstance(roots, str | Path) else roots
        self.roots = tuple(Path(root) for root in given)
        for root in self.roots:
            if not root.is_dir():
                raise ImageError.at(
                    str(root), "is not a folder of pictures", "give the folder that the records' paths start from"
                )
        self._real = tuple(os.path.realpath(root) for root in self.roots)

    def __repr__(self) -> str:
        return f"ImageRoots({[str(root) for root in self.roots]})"

    def resolve(self, path: str, *, guess: bool = True) -> Path:
        """Find an image's file.

        Args:
            path: As written in the record, with ``/``.
            guess: Whether a missing one's message names a similar file, for which its folder is read.

        Returns:
            The file in the first root that has it.

        Raises:
            ImageError: No root has it, or it lies outside its root.
        """
        if not self.roots:
            raise ImageError.at(
                path, "no image folders were given", "name the folders that the records' paths start from"
            )
        if not path or "\0" in path or os.path.isabs(path):
            raise ImageError.at(
                repr(path), "is not a relative path", "write pictures' paths relative to an image folder"
            )
        for root in self.roots:
            candidate = os.path.join(root, path)
            if os.path.isfile(candidate):
                self._check_inside(candidate, path)
                return Path(candidate)
        # Before anything is said about folders: what lies outside must not even be asked for by name.
        for root in self.roots:
            self._check_inside(os.path.join(root, path), path)
        raise self._missing(path, guess=guess)

    def open(self, path: str) -> Image.Image:
        """Open an image by the path written in the record, upright and in RGB. Raises ``ImageError``."""
        from llavar_peft.data.image_files import open_image

        return open_image(self.resolve(path))

    def is_inside(self, place: str | Path) -> bool:
        """Whether a place, all symbolic links followed, lies in one of the roots."""
        real = os.path.realpath(place)
        return any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in self._real)

    def leaves(self, path: str) -> bool:
        """Whether a record's path leads out of the roots."""
        return os.path.isabs(path) or not all(self.is_inside(os.path.join(root, path)) for root in self.roots)

    def _check_inside(self, candidate: str, path: str) -> None:
        if not self.is_inside(candidate):
            real = os.path.realpath(candidate)
            raise ImageError.at(
                path,
                f"leads outside the image folders (to {real})",
                "copy the picture into one of them, or name its folder too",
            )

    def _missing(self, path: str, *, guess: bool) -> LlavarError:
        similar = [name for root in self.roots for name in _similar(root, path)] if guess else []
        where = ", ".join(str(root) for root in self.roots)
        there = f" (there is {similar[0]})" if similar else ""
        folder = any(os.path.isdir(os.path.join(root, path)) for root in self.roots)
        what = "is a folder, expected a picture" if folder else f"is in none of {where}{there}"
        return ImageError.at(path, what, "get the picture, correct the path, or add the folder that has it")


def _similar(root: Path, path: str) -> Sequence[str]:
    """Name beside a missing one that may be meant: other slashes, other case, other extension, a slip."""
    if "\\" in path and (root / path.replace("\\", "/")).is_file():
        return [path.replace("\\", "/")]
    folder, name = os.path.split(path)
    try:
        with os.scandir(root / folder) as entries:
            names = [entry.name for entry in islice(entries, _NAMES_READ)]
    except OSError:
        return []
    stem = os.path.splitext(name)[0].casefold()
    same = [other for other in names if os.path.splitext(other)[0].casefold() == stem]
    found = same or get_close_matches(name, names[:2000], n=1, cutoff=0.8)
    return [os.path.join(folder, other) for other in sorted(found)]


class Finder:
    """Answers for very many images whether they are there, without opening them.

    A folder that is asked for often is read once, which on a network disk is a thousand times faster than asking for
    each file. What it was like then is what is answered.

    Args:
        roots: Where to look.
    """

    def __init__(self, roots: ImageRoots) -> None:
        self._roots = roots
        self._asked: dict[str, int] = {}
        self._names: dict[str, frozenset[str]] = {}

    def has(self, path: str) -> bool:
        """Whether a record's path leads to a file within the roots; False may also mean that ``resolve`` must tell."""
        folder, _, name = path.rpartition("/")
        names = self._names.get(folder)
        if names is None:
            count = self._asked[folder] = self._asked.get(folder, 0) + 1
            if count <= _LISTED_AFTER:
                return False
            names = self._names[folder] = frozenset(self._list(folder))
        return name in names

    def _list(self, folder: str) -> Iterable[str]:
        for root in self._roots.roots:
            place = os.path.join(root, folder)
            if os.path.isabs(folder) or not self._roots.is_inside(place):
                continue
            try:
                with os.scandir(place) as entries:
                    yield from (entry.name for entry in entries if entry.is_file(follow_symlinks=False))
            except OSError:
                continue
