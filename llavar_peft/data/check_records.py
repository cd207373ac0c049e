"""Looking at records and their images before they cost GPU time.

``check_records`` lists all that is wrong and opens every image; ``preflight`` finds what would stop a run, for a
million records in seconds, and opens none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from typing import Any, Final, Protocol

from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.data.image_roots import Finder, ImageRoots
from llavar_peft.data.record_findings import Kind, RecordFinding, RecordReport
from llavar_peft.data.record_store import parse_record
from llavar_peft.errors import DataError, Fault, ImageError
from llavar_peft.types import Conversation

_CHUNK: Final = 1024
_GUESSES: Final = 20
"""Missing images that a similar name is looked for: each costs reading a folder."""
_DUPLICATES_SHOWN: Final = 3


class RecordSource(Protocol):
    """Raw records by index, each with a name for messages."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, index: int) -> Any:
        """One, as it stands in its file."""
        ...

    def where(self, index: int) -> str:
        """Its name, ending in ``:index``."""
        ...


def check_records(
    store: RecordSource,
    roots: ImageRoots,
    open_images: bool = True,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RecordReport:
    """List every fault of every record, with the record and what to do.

    Args:
        store: The records.
        roots: Where their images are; with no folder at all, one finding says so and images are not looked for.
        open_images: Whether each image is decoded too, exactly as in training; False only looks whether it is there.
        workers: Threads that open images (Pillow decodes without the interpreter's lock); None is one per CPU.
        progress: Called with (records done, records in all).

    Returns:
        What was found.
    """
    total = len(store)
    images = _Images(roots, open_images=open_images)
    faults: list[RecordFinding] = []
    ids = _Ids()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for start in range(0, total, _CHUNK):
            indices = range(start, min(total, start + _CHUNK))
            examined = [_examine(store, index) for index in indices]
            paths = {path for conversation, _ in examined if conversation for path in conversation.images}
            found = images.look_at(paths, pool)
            for index, (conversation, findings) in zip(indices, examined, strict=True):
                faults += findings
                if conversation is not None:
                    where = store.where(index)
                    ids.add(conversation.id, index, where)
                    faults += _image_findings(conversation, found, where, index)
            if progress is not None:
                progress(indices.stop, total)
    if images.unsought:
        what = f"{len(images.unsought)} pictures are named in the records, and no image folders were given"
        faults.append(RecordFinding(store.where(0), what, "name the image folders", "no_image_folder", 0))
    return RecordReport(total, images.opened, tuple(faults), tuple(ids.findings(store)))


def preflight(store: RecordSource, roots: ImageRoots) -> list[tuple[int, Fault]]:
    """Find records that cannot be read and images that are not there. Opens no image.

    Args:
        store: The records.
        roots: Where their images are.

    Returns:
        (index, fault) in the records' order; a record with several faults comes several times.
    """
    finder, guesses = Finder(roots), count()
    found: list[tuple[int, Fault]] = []
    for index in range(len(store)):
        try:
            raw = store[index]
            images = _images_if_ordinary(raw)
            if images is None:
                images = parse_record(raw, store.where(index)).images
        except DataError as error:
            found += [(index, fault) for fault in error.faults]
            continue
        for path in images:
            absent = None if finder.has(path) else _absence(roots, path, guesses)
            if absent is not None:
                found.append((index, _at(store.where(index), absent)))
    return found


def _absence(roots: ImageRoots, path: str, guesses: Iterator[int]) -> Fault | None:
    """Why an image is not there, with a guess for the first few."""
    try:
        roots.resolve(path, guess=False)
    except ImageError as error:
        if next(guesses) >= _GUESSES:
            return error.faults[0]
        try:
            roots.resolve(path)
        except ImageError as guessed:
            return guessed.faults[0]
    return None


def _images_if_ordinary(raw: Any) -> tuple[str, ...] | None:
    """The image of a record that is plainly sound; None sends it to ``parse_record``, which takes much longer."""
    if type(raw) is not dict or type(raw.get("id")) is not str or type(raw.get("conversations")) is not list:
        return None
    role, other = "human", "gpt"
    for turn in raw["conversations"]:
        if type(turn) is not dict or turn.get("from") != role or type(turn.get("value")) is not str:
            return None
        role, other = other, role
    image = raw.get("image")
    return (image,) if type(image) is str and image and raw["conversations"] else None


def _examine(store: RecordSource, index: int) -> tuple[Conversation | None, list[RecordFinding]]:
    where = store.where(index)
    try:
        conversation = parse_record(store[index], where)
    except DataError as error:
        return None, [RecordFinding(fault.where, fault.what, fault.fix, "record", index) for fault in error.faults]
    return conversation, [
        RecordFinding(where, what, fix, kind, index) for kind, what, fix in _content_faults(conversation)
    ]


def _content_faults(conversation: Conversation) -> Iterator[tuple[Kind, str, str]]:
    """What is well-formed and yet teaches nothing, or the wrong thing."""
    turns = conversation.turns
    places = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    if conversation.images and not places:
        yield (
            "placeholder",
            f"names a picture and has no {IMAGE_PLACEHOLDER}, so that the picture is never shown",
            f"write {IMAGE_PLACEHOLDER} where it belongs in the first turn",
        )
    if places and not conversation.images:
        yield (
            "placeholder",
            f"has {IMAGE_PLACEHOLDER} and names no picture, so that it stays ordinary text",
            f"name the picture under 'image', or remove {IMAGE_PLACEHOLDER}",
        )
    answers = [turn.text for turn in turns if turn.role == "gpt"]
    if not answers:
        yield "no_answer", "has no answer to learn", "write one, or remove the record"
    elif turns[-1].role == "human":
        yield "last_turn", "ends with a turn by 'human', which nothing answers", "remove that turn, or answer it"
    empty = sum(not answer.strip() for answer in answers)
    if empty:
        yield "empty_answer", f"has {empty} empty of {len(answers)} answers", "write them, or remove the record"


def _image_findings(
    conversation: Conversation, found: dict[str, tuple[Kind, Fault]], where: str, index: int
) -> Iterator[RecordFinding]:
    for path in dict.fromkeys(conversation.images):
        if path in found:
            kind, fault = found[path]
            placed = _at(where, fault)
            yield RecordFinding(placed.where, placed.what, placed.fix, kind, index)


def _at(where: str, fault: Fault) -> Fault:
    return Fault(f"{where}: {fault.where}", fault.what, fault.fix)


class _Images:
    """Looks at each image once, however many records name it."""

    def __init__(self, roots: ImageRoots, *, open_images: bool) -> None:
        self._roots = roots
        self._open = open_images
        self._finder = Finder(roots)
        self._guesses = count()
        self._seen: set[int] = set()  # hashes: a million paths would take 100 MB
        self._bad: dict[str, tuple[Kind, Fault]] = {}
        self.unsought: set[str] = set()
        self.opened = 0

    def look_at(self, paths: set[str], pool: ThreadPoolExecutor) -> dict[str, tuple[Kind, Fault]]:
        """Return what is wrong with images, those looked at before included, by path."""
        if not self._roots.roots:
            self.unsought |= paths
            return {}
        new = sorted(path for path in paths if hash(path) not in self._seen)
        self._seen.update(hash(path) for path in new)
        for path, fault in zip(new, pool.map(self._fault, new), strict=True):
            if fault is not None:
                self._bad[path] = fault
            elif self._open:
                self.opened += 1
        return self._bad

    def _fault(self, path: str) -> tuple[Kind, Fault] | None:
        if not self._open and self._finder.has(path):
            return None
        absent = _absence(self._roots, path, self._guesses)
        if absent is not None:
            return "image_outside" if self._roots.leaves(path) else "image_missing", absent
        if self._open:
            try:
                self._roots.open(path)
            except ImageError as error:
                return "image_broken", error.faults[0]
        return None


class _Ids:
    """Which ids are used more than once."""

    def __init__(self) -> None:
        self._first: dict[int, int] = {}
        self._again: dict[str, list[int]] = {}

    def add(self, identity: str, index: int, where: str) -> None:
        if identity == where.rpartition(":")[2]:
            return  # the index, standing in for a missing id
        first = self._first.setdefault(hash(identity), index)
        if first != index:
            self._again.setdefault(identity, [first]).append(index)

    def findings(self, store: RecordSource) -> Iterator[RecordFinding]:
        for identity, indices in self._again.items():
            shown = ", ".join(store.where(index) for index in islice(indices, 1, 1 + _DUPLICATES_SHOWN))
            more = f" and {len(indices) - 1 - _DUPLICATES_SHOWN} more" if len(indices) > 1 + _DUPLICATES_SHOWN else ""
            what = f"id {identity!r} is used again by {shown}{more}"
            yield RecordFinding(
                store.where(indices[0]), what, "make it unique if it should be", "duplicate_id", indices[0]
            )
