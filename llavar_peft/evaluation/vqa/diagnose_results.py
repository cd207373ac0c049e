"""Where a model reads and where it does not: by the letters' height as the tower sees them, by length, script, place.

The paper's curve of recognisable sizes is the first of these. Heights need a data set that gives ``text_height`` or
``box``, in the image's pixels, or an OCR pass over its images.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from llavar_peft.data.image_preparation import ImageRoots
from llavar_peft.data.record_store import open_records
from llavar_peft.errors import DataError
from llavar_peft.evaluation.vqa.scored_results import Answered, Results, rate
from llavar_peft.evaluation.vqa.text_size import read_text_size
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion
from llavar_peft.types import ImageMode

SMALLEST: Final = 7.0
"""Pixels of the tower below which letters count as too small: half of a patch of 14, where two lines share one."""

LETTER_HEIGHT: Final = "letter height"
ANSWER_LENGTH: Final = "answer length"
_HEIGHTS: Final = (4, 6, 8, 12, 16, 24, 48)
_LENGTHS: Final = (4, 8, 16, 32)
_KEEP: Final = (448, 224)  # longest and shortest side of the mode "keep"
_MOST_KINDS: Final = 20
_COLUMNS, _ROWS = ("left", "centre", "right"), ("top", "middle", "bottom")

Measure = tuple[float | None, tuple[float, float] | None]
"""Letters' height in the tower's pixels, and (x, y) of the text's middle in the image, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Group:
    """A figure of some of the answers.

    Attributes:
        by: What they were told apart by.
        name: What these have in common.
        records: How many they are.
        value: In percent.
        low: Lower end of the 95 % bootstrap interval.
        high: Upper end.
    """

    by: str
    name: str
    records: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class TooSmall:
    """How much of the text cannot be read at this resolution.

    Attributes:
        records: With text lower than ``smallest``.
        known: Whose letters' height is known.
        smallest: Pixels of the tower.
    """

    records: int
    known: int
    smallest: float


def tower_scale(size: tuple[int, int], mode: ImageMode, side: int) -> float:
    """How many pixels of the tower a pixel of an image becomes.

    Args:
        size: The image's (width, height).
        mode: How it is prepared; see ``data.images``.
        side: Of what the tower sees, in pixels.

    Returns:
        The factor.
    """
    short, long = sorted(size)
    if mode == "keep":
        return min(_KEEP[0] / long, _KEEP[1] / short)
    return side / (short if mode == "square" else long)


def measure_letter_height(
    questions: Iterable[VqaQuestion], roots: ImageRoots | None, mode: ImageMode, side: int
) -> dict[str, Measure]:
    """Measure the text that holds each answer, where the data set says where it stands or how high it is.

    Args:
        questions: With ``text_height`` or ``box``; of a box, which is one line's, the height is taken.
        roots: Where images are whose size the data set does not give; None leaves these out.
        mode: How images are prepared.
        side: Of what the tower sees, in pixels.

    Returns:
        What is known, by question.

    Raises:
        ImageError: An image that has to be measured cannot be opened.
    """
    sizes: dict[str, tuple[int, int]] = {}
    found: dict[str, Measure] = {}
    for question in questions:
        height = question.text_height or (question.box[3] - question.box[1] if question.box else None)
        if height is None:
            continue
        size = question.size
        if size is None and roots is not None and question.image is not None:
            size = sizes[question.image] = sizes.get(question.image) or roots.open(question.image).size
        if size is None:
            continue
        found[question.id] = (height * tower_scale(size, mode, side), _middle(question.box, size))
    return found


def borrow_heights(questions: Sequence[VqaQuestion], records: Path) -> list[VqaQuestion]:
    """Take from an OCR pass how high letters are, for the questions whose data set does not say it.

    Args:
        questions: Of one data set.
        records: What ``ocr build`` made of its images. They say the median height of each image's lines, so it is
            the image's letters that are measured, not the answer's.

    Returns:
        The questions, those that lack a height with their image's, where the records have it.

    Raises:
        DataError: The records cannot be read, or none is of one of these images.
    """
    expected = {question.image for question in questions}
    store = open_records(records)
    known = {
        record["image"]: read_text_size(record, f"{records}: record {number}")
        for number, record in enumerate(store[place] for place in range(len(store)))
        if record.get("image") in expected
    }
    if not known:
        raise DataError.at(
            str(records), "is of none of the pictures asked about", "run 'ocr build' on the folder that --images names"
        )
    return [
        question if question.image not in known or question.text_height or question.box
        else replace(question, text_height=known[question.image]["text_height"], size=known[question.image]["size"])
        for question in questions
    ]  # fmt: skip


def _middle(box: tuple[float, float, float, float] | None, size: tuple[int, int]) -> tuple[float, float] | None:
    if box is None:
        return None
    x, y = (box[0] + box[2]) / 2 / size[0], (box[1] + box[3]) / 2 / size[1]
    return min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)


def break_down(results: Results, protocol: str) -> list[Group]:
    """Take a protocol's figure of each kind of record.

    Args:
        results: With scores by this protocol.
        protocol: Which.

    Returns:
        Groups, those by one thing after each other, in the order of their size or name.
    """
    return [
        Group(by, name, len(records), *rate(records, protocol))
        for by, members in group_records(results.records).items()
        for name, records in members.items()
    ]


def count_too_small(records: Sequence[Answered], smallest: float = SMALLEST) -> TooSmall:
    """Count the records whose text is too small to be read at this resolution.

    Args:
        records: Measured or not.
        smallest: Height in the tower's pixels from which letters can be read.

    Returns:
        How many of those whose letters' height is known.
    """
    heights = [record.letter_height for record in records if record.letter_height is not None]
    return TooSmall(sum(height < smallest for height in heights), len(heights), smallest)


def group_records(records: Sequence[Answered]) -> dict[str, dict[str, list[Answered]]]:
    """Tell records apart, by each of the things that are known of them and tell at least two kinds apart.

    Args:
        records: Of one data set.

    Returns:
        By thing, then by kind, the records.
    """
    found: dict[str, dict[tuple[int, str], list[Answered]]] = {}
    for record in records:
        for by, order, name in _kinds(record):
            found.setdefault(by, {}).setdefault((order, name), []).append(record)
    return {
        by: {name: members[order, name] for order, name in sorted(members)}
        for by, members in found.items()
        if by == LETTER_HEIGHT or 2 <= len(members) <= _MOST_KINDS
    }


def _kinds(record: Answered) -> Iterator[tuple[str, int, str]]:
    """What a record is told apart by: thing, place in its order, kind."""
    if record.letter_height is not None:
        yield LETTER_HEIGHT, *_bin(record.letter_height, _HEIGHTS, " px", 0)
    yield ANSWER_LENGTH, *_bin(min(len(truth) for truth in record.truths), _LENGTHS, " letters", 1)
    yield "script", 0, script_of("".join(record.truths))
    if record.position is not None:
        column, row = (min(int(3 * part), 2) for part in record.position)
        yield "position", 3 * row + column, f"{_ROWS[row]} {_COLUMNS[column]}"
    for key, value in sorted(record.fields.items()):
        yield key, 0, value


def _bin(value: float, edges: Sequence[int], unit: str, step: int) -> tuple[int, str]:
    """The bin of a number: its place and its name; ``step`` 1 is for whole numbers (4-7), 0 for others (4-8)."""
    place = sum(value >= edge for edge in edges)
    if place == 0:
        return 0, f"below {edges[0]}{unit}"
    if place == len(edges):
        return place, f"{edges[-1]} and more{unit}"
    return place, f"{edges[place - 1]}-{edges[place] - step}{unit}"


def script_of(text: str) -> str:
    """Name the script of a text's letters.

    Args:
        text: In any language.

    Returns:
        ``"latin"``, ``"cyrillic"``, ``"cjk"``, ...; ``"mixed"`` for several, ``"digits"`` or ``"signs"`` for none.
    """
    # The first word of a letter's name in Unicode is its script.
    scripts = Counter(unicodedata.name(letter, "other").split()[0].lower() for letter in text if letter.isalpha())
    if not scripts:
        return "digits" if any(letter.isdigit() for letter in text) else "signs"
    return next(iter(scripts)) if len(scripts) == 1 else "mixed"
