"""Check records and their images before a run.

``check_records`` reports everything that is wrong and opens every image. ``preflight`` finds the records that would
stop a run; it opens no image and takes seconds for a million records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import count
from typing import Any, Final, Literal

from llavar_peft.compat.usable_cores import usable_cores
from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.data.image_roots import FolderListing, ImageRoots
from llavar_peft.data.pdf_pages import names_pdf
from llavar_peft.data.pdf_process import require_pdf
from llavar_peft.data.record_images import is_image_path
from llavar_peft.data.record_store import RecordSource, count_placeholders, parse_record
from llavar_peft.errors import DataError, Fault, ImageError
from llavar_peft.types import Conversation, EmbeddedImage, ImageSource, ReadableRepr

Kind = Literal[
    "record",
    "placeholder",
    "placeholder_in_answer",
    "no_answer",
    "empty_answer",
    "last_turn",
    "no_image_folder",
    "image_missing",
    "image_outside",
    "image_broken",
    "duplicate_id",
]
"""``duplicate_id`` (LLaVA-Instruct repeats many ids) and ``placeholder_in_answer`` are warnings, the others faults."""

_OTHER_KEYS: Final = frozenset(("video", "images", "messages"))
_CHUNK: Final = 1024  # records between two progress reports
_MAX_GUESSES: Final = 20  # missing images for which a similar name is searched, which reads a folder
_DUPLICATES_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class RecordFinding(Fault):
    """A fault of a record, with its kind and the record's index in the store."""

    kind: Kind
    index: int


@dataclass(frozen=True, repr=False)
class RecordReport(ReadableRepr, Sequence[RecordFinding]):
    """The result of ``check_records``; as a sequence, its faults.

    Attributes:
        records: Number of records checked.
        images_opened: Number of different images that could be opened.
        faults: What has to be fixed, in the order of the records.
        warnings: What may be intended.
    """

    records: int
    images_opened: int
    faults: tuple[RecordFinding, ...]
    warnings: tuple[RecordFinding, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.faults)

    def __getitem__(self, index: Any) -> Any:
        """Return a fault, or several for a slice."""
        return self.faults[index]

    @property
    def clean(self) -> bool:
        """Whether there are no faults."""
        return not self.faults

    @property
    def counts(self) -> dict[str, int]:
        """Number of faults and warnings of each kind, most frequent first."""
        return dict(Counter(finding.kind for finding in (*self.faults, *self.warnings)).most_common())

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "records": self.records,
            "images_opened": self.images_opened,
            "clean": self.clean,
            "counts": self.counts,
            "faults": [asdict(finding) for finding in self.faults],
            "warnings": [asdict(finding) for finding in self.warnings],
        }


def check_records(
    store: RecordSource,
    roots: ImageRoots,
    open_images: bool = True,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> RecordReport:
    """Find every fault of every record and of its images.

    Args:
        store: The records.
        roots: The image folders; without any, a single finding reports that they are missing.
        open_images: Decode each image as training does; False only checks that its file exists.
        workers: Number of threads that open images; None for one per usable core.
        progress: Called with (number of records checked, number of records).
    """
    total = len(store)
    checker = _ImageChecker(roots, open_images=open_images)
    faults: list[RecordFinding] = []
    warnings: list[RecordFinding] = []
    first_by_id: dict[int, int] = {}  # by the hash of the id, to save memory
    repeated: dict[str, list[int]] = {}
    with ThreadPoolExecutor(workers or usable_cores()) as pool:
        for start in range(0, total, _CHUNK):
            indices = range(start, min(total, start + _CHUNK))
            parsed = [_parse(store, index) for index in indices]
            conversations = [conversation for conversation, _ in parsed if conversation]
            named_images = {image for conversation in conversations for image in conversation.images}
            bad_images = checker.check(named_images, pool)
            for index, (conversation, findings) in zip(indices, parsed, strict=True):
                faults += findings
                if conversation is None:
                    continue
                where = store.where(index)
                warnings += _placeholders_in_answers(conversation, where, index)
                faults += _image_findings(conversation, bad_images, where, index)
                if conversation.id == where.rpartition(":")[2]:
                    continue  # the index, used as the id of a record without one
                first = first_by_id.setdefault(hash(conversation.id), index)
                if first != index:
                    repeated.setdefault(conversation.id, [first]).append(index)
            if progress is not None:
                progress(indices.stop, total)
    if checker.without_folder:
        what = f"the records name {len(checker.without_folder)} images, and no image folder was given"
        fix = "give the folder that the image paths start from (--images)"
        faults.append(RecordFinding(store.where(0), what, fix, "no_image_folder", 0))
    return RecordReport(total, checker.opened, tuple(faults), (*warnings, *_duplicates(store, repeated)))


def summarize_faults(faults: Sequence[RecordFinding], records: int) -> list[Fault]:
    """Return the faults to show: one instead of thousands where every record lacks its image, as with a wrong folder.

    Args:
        faults: All faults.
        records: Number of records.
    """
    missing = [fault for fault in faults if fault.kind == "image_missing"]
    if records < 2 or len({fault.index for fault in missing}) < records:
        return list(faults)
    first = missing[0]
    what = f"{first.what}, like the images of all {records} records"
    summary = Fault(first.where, what, "give the folder that the image paths start from")
    return [summary, *(fault for fault in faults if fault.kind != "image_missing")]


def preflight(store: RecordSource, roots: ImageRoots) -> list[RecordFinding]:
    """Find every fault of the records that ``check_records`` finds without opening an image.

    Returns:
        The faults in the order of the records.

    Raises:
        MissingDependencyError: A record names a PDF document, and pypdfium2 is not installed.
    """
    listing, guesses = FolderListing(roots), count()
    findings: list[RecordFinding] = []
    for index in range(len(store)):
        raw = _read(store, index)
        images = _image_of_valid_record(raw)
        if images is None:
            conversation, faults = _parse(store, index, raw)
            findings += faults
            images = conversation.images if conversation else ()
        for path in images:
            if isinstance(path, EmbeddedImage):
                continue
            if names_pdf(path):
                require_pdf(f"{store.where(index)}: {path}")
            missing = None if listing.contains(path) else _missing(roots, path, guesses)
            if missing is not None:
                kind: Kind = "image_outside" if roots.leads_outside(path) else "image_missing"
                findings.append(
                    RecordFinding(f"{store.where(index)}: {missing.where}", missing.what, missing.fix, kind, index)
                )
    return findings


def _read(store: RecordSource, index: int) -> Any:
    """Return a raw record; None if it is not JSON."""
    try:
        return store[index]
    except DataError:
        return None


def _missing(roots: ImageRoots, path: str, guesses: Iterator[int]) -> Fault | None:
    """Return the fault of an image that cannot be found, with the name of a similar file for the first few."""
    try:
        roots.resolve(path, guess=False)
    except ImageError as error:
        if next(guesses) >= _MAX_GUESSES:
            return error.faults[0]
        try:
            roots.resolve(path)
        except ImageError as guessed:
            return guessed.faults[0]
    return None


def _image_of_valid_record(raw: Any) -> tuple[ImageSource, ...] | None:
    """Return the image of a faultless record of the usual form; None if only the slower ``_parse`` can tell."""
    if type(raw) is not dict or type(raw.get("id", "")) is not str or type(raw.get("conversations")) is not list:
        return None
    expected_role, next_role, has_placeholder = "human", "gpt", False
    for turn in raw["conversations"]:
        if type(turn) is not dict or turn.get("from") != expected_role or type(turn.get("value")) is not str:
            return None
        if expected_role == "human":
            has_placeholder = has_placeholder or IMAGE_PLACEHOLDER in turn["value"]
        elif not turn["value"].strip():
            return None
        expected_role, next_role = next_role, expected_role
    image = raw.get("image")
    if type(image) is not str or not is_image_path(image) or not _OTHER_KEYS.isdisjoint(raw):
        return None
    ends_with_answer = expected_role == "human"
    return (image,) if has_placeholder and ends_with_answer else None


def _parse(store: RecordSource, index: int, raw: Any = None) -> tuple[Conversation | None, list[RecordFinding]]:
    where = store.where(index)
    try:
        conversation = parse_record(store[index] if raw is None else raw, where)
    except DataError as error:
        return None, [RecordFinding(fault.where, fault.what, fault.fix, "record", index) for fault in error.faults]
    faults = _content_faults(conversation)
    return conversation, [RecordFinding(where, what, fix, kind, index) for kind, what, fix in faults]


def _content_faults(conversation: Conversation) -> Iterator[tuple[Kind, str, str]]:
    """Find faults of a valid record that leave it without effect, or that teach the wrong thing."""
    turns = conversation.turns
    placeholders = count_placeholders(turns)
    if conversation.images and not placeholders:
        what = f"names an image but no human turn contains {IMAGE_PLACEHOLDER}, so the model never sees the image"
        yield "placeholder", what, f"insert {IMAGE_PLACEHOLDER} into the first turn"
    if placeholders and not conversation.images:
        what = f"contains {IMAGE_PLACEHOLDER} but names no image, so {IMAGE_PLACEHOLDER} is treated as ordinary text"
        yield "placeholder", what, f"name the image under 'image', or remove {IMAGE_PLACEHOLDER}"
    answers = [turn.text for turn in turns if turn.role == "gpt"]
    if not answers:
        yield "no_answer", "has no turn from 'gpt' to learn from", "add the answer, or remove the record"
    elif turns[-1].role == "human":
        yield "last_turn", "the last turn is from 'human' and has no answer", "add the answer, or remove the last turn"
    empty = sum(not answer.strip() for answer in answers)
    if empty:
        yield (
            "empty_answer",
            f"{empty} of {len(answers)} answers {'is' if empty == 1 else 'are'} empty",
            "write them, or remove the record",
        )


def _placeholders_in_answers(conversation: Conversation, where: str, index: int) -> Iterator[RecordFinding]:
    count = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in conversation.turns if turn.role == "gpt")
    if count:
        what = f"an answer contains {IMAGE_PLACEHOLDER} ({count} times), which is learned as text and shows no image"
        fix = f"remove it from the answer, unless the model should write {IMAGE_PLACEHOLDER}"
        yield RecordFinding(where, what, fix, "placeholder_in_answer", index)


def _image_findings(
    conversation: Conversation, bad_images: dict[ImageSource, tuple[Kind, Fault]], where: str, index: int
) -> Iterator[RecordFinding]:
    for path in dict.fromkeys(conversation.images):
        if path in bad_images:
            kind, fault = bad_images[path]
            yield RecordFinding(f"{where}: {fault.where}", fault.what, fault.fix, kind, index)


def _duplicates(store: RecordSource, repeated: dict[str, list[int]]) -> Iterator[RecordFinding]:
    for identity, (first, *others) in repeated.items():
        shown = ", ".join(store.where(index) for index in others[:_DUPLICATES_SHOWN])
        more = f" and {len(others) - _DUPLICATES_SHOWN} more" if len(others) > _DUPLICATES_SHOWN else ""
        what = f"the id {identity!r} is used again by {shown}{more}"
        fix = "give each record its own id, unless the repetition is intended"
        yield RecordFinding(store.where(first), what, fix, "duplicate_id", first)


class _ImageChecker:
    """Checks each image once, even if many records name it."""

    def __init__(self, roots: ImageRoots, *, open_images: bool) -> None:
        self._roots = roots
        self._open = open_images
        self._listing = FolderListing(roots)
        self._guesses = count()
        self._checked: set[int] = set()  # hashes: a million paths would take 100 MB
        self._bad: dict[ImageSource, tuple[Kind, Fault]] = {}
        self.without_folder: set[str] = set()
        self.opened = 0

    def check(self, images: set[ImageSource], pool: ThreadPoolExecutor) -> dict[ImageSource, tuple[Kind, Fault]]:
        """Check images, and return the faults of these images and of all paths checked so far."""
        new: list[ImageSource] = []
        new += sorted(path for path in images if isinstance(path, str) and hash(path) not in self._checked)
        if not self._roots.roots:
            self.without_folder.update(path for path in images if isinstance(path, str))
            new = []
        self._checked.update(hash(path) for path in new)
        new += [image for image in images if isinstance(image, EmbeddedImage)]
        faults = {path: self._bad[path] for path in images if path in self._bad}
        for image, fault in zip(new, pool.map(self._fault, new), strict=True):
            if fault is not None:
                faults[image] = fault
                if isinstance(image, str):
                    self._bad[image] = fault
            elif self._open:
                self.opened += 1
        return faults

    def _fault(self, path: ImageSource) -> tuple[Kind, Fault] | None:
        """Return what is wrong with an image, and its kind; None if nothing is."""
        if isinstance(path, EmbeddedImage):
            return self._why_broken(path) if self._open else None
        if not self._open and self._listing.contains(path):
            return None
        missing = _missing(self._roots, path, self._guesses)
        if missing is not None:
            return "image_outside" if self._roots.leads_outside(path) else "image_missing", missing
        return self._why_broken(path) if self._open else None

    def _why_broken(self, image: ImageSource) -> tuple[Kind, Fault] | None:
        try:
            self._roots.open(image)
        except ImageError as error:
            return "image_broken", error.faults[0]
        return None
