"""Group results by letter height as the tower sees it, by answer length, script, position and kind of text.

Heights need a data set that gives ``text_height`` or ``box`` in image pixels, or an OCR pass over its images.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.image_views import ImageViews
from llavar_peft.data.record_store import open_records
from llavar_peft.data.text_size import SMALLEST_LETTERS, read_text_size
from llavar_peft.errors import DataError
from llavar_peft.evaluation.vqa.scored_results import Answered, Results, rate
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion
from llavar_peft.types import ImageMode

LETTER_HEIGHT: Final = "letter height"
ANSWER_LENGTH: Final = "answer length"
_HEIGHTS: Final = (4, 6, 8, 12, 16, 24, 48)
_LENGTHS: Final = (4, 8, 16, 32)
_MAX_VALUES: Final = 20
_COLUMNS, _ROWS = ("left", "centre", "right"), ("top", "middle", "bottom")

Measure = tuple[float | None, tuple[float, float] | None]
"""Letter height in pixels of the tower's input, and the centre (x, y) of the text in the image, from 0 to 1."""


@dataclass(frozen=True, slots=True)
class Group:
    """The figure of a group of answers.

    Attributes:
        by: What the answers are grouped by.
        name: The value that they have in common.
        records: Number of answers.
        value: In percent.
        low: Lower end of the 95 % interval, as that of a ``Figure``.
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
    """The number of records whose text is too small to be read at this resolution.

    Attributes:
        records: Number of records with letters lower than ``smallest``.
        known: Number of records whose letter height is known.
        smallest: Pixels of the tower's input.
    """

    records: int
    known: int
    smallest: float


def measure_letter_height(
    questions: Iterable[VqaQuestion], roots: ImageRoots | None, mode: ImageMode, processor: Any
) -> dict[str, Measure]:
    """Measure the text that holds each answer, where the data set gives its box or height.

    The height is that in the largest view of the image that the model sees: with tiles, in the tiles.

    Args:
        questions: Questions, some with ``text_height`` or ``box``. The height of a box is used as that of one line.
        roots: Folders of images whose size the data set does not give; None leaves these images out.
        mode: How images are prepared.
        processor: The model's, or the side of the tower's input in pixels.

    Returns:
        The measures by question id, where known.

    Raises:
        ImageError: An image that has to be measured cannot be opened.
    """
    sizes: dict[str, tuple[int, int]] = {}
    found: dict[str, Measure] = {}
    views = ImageViews.of_model(processor, mode)
    for question in questions:
        height = question.text_height or (question.box[3] - question.box[1] if question.box else None)
        if height is None:
            continue
        size = question.size
        if size is None and roots is not None and question.image is not None:
            size = sizes[question.image] = sizes.get(question.image) or roots.open(question.image).size
        if size is None:
            continue
        found[question.id] = (height * views.seen([size])[0].scale, _centre(question.box, size))
    return found


def borrow_heights(questions: Sequence[VqaQuestion], records: Path) -> list[VqaQuestion]:
    """Complete the letter heights of questions by those of an OCR pass over the images.

    Args:
        questions: Questions of one data set.
        records: Records that ``ocr build`` wrote for the images. They give the median height of an image's lines, so
            the height is that of the image's text, not of the answer's.

    Returns:
        The questions, with the height of their image where they had none.

    Raises:
        DataError: The records cannot be read, or are all of other images.
    """
    expected = {question.image for question in questions}
    store = open_records(records)
    known = {
        record["image"]: read_text_size(record, f"{records}: record {number}")
        for number, record in enumerate(store[place] for place in range(len(store)))
        if isinstance(record, Mapping) and isinstance(record.get("image"), str) and record["image"] in expected
    }
    if not known:
        raise DataError.at(
            str(records), "holds none of the images of the questions", "run 'ocr build' on the folder given as --images"
        )
    return [
        question if question.image not in known or question.text_height or question.box
        else replace(question, text_height=known[question.image]["text_height"], size=known[question.image]["size"])
        for question in questions
    ]  # fmt: skip


def _centre(box: tuple[float, float, float, float] | None, size: tuple[int, int]) -> tuple[float, float] | None:
    if box is None:
        return None
    x, y = (box[0] + box[2]) / 2 / size[0], (box[1] + box[3]) / 2 / size[1]
    return min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)


def break_down(results: Results, protocol: str) -> list[Group]:
    """Return the figure of each group of records, scored by a protocol."""
    return [
        Group(by, name, len(records), *rate(records, protocol))
        for by, members in group_records(results.records).items()
        for name, records in members.items()
    ]


def count_too_small(records: Sequence[Answered], smallest: float = SMALLEST_LETTERS) -> TooSmall:
    """Count the records whose text is too small to be read at this resolution.

    Args:
        records: Records with or without a letter height.
        smallest: Height in pixels of the tower's input from which letters can be read.
    """
    heights = [record.letter_height for record in records if record.letter_height is not None]
    return TooSmall(sum(height < smallest for height in heights), len(heights), smallest)


def group_records(records: Sequence[Answered]) -> dict[str, dict[str, list[Answered]]]:
    """Group the records of a data set by each property that has at least two values.

    Returns:
        Records by property and value, in the order of the values.
    """
    found: dict[str, dict[tuple[int, str], list[Answered]]] = {}
    for record in records:
        for by, order, name in _values(record):
            found.setdefault(by, {}).setdefault((order, name), []).append(record)
    return {
        by: {name: members[order, name] for order, name in sorted(members)}
        for by, members in found.items()
        if by == LETTER_HEIGHT or 2 <= len(members) <= _MAX_VALUES
    }


def _values(record: Answered) -> Iterator[tuple[str, int, str]]:
    """Yield the properties of a record: name, place of the value in the order, value."""
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
    """Return index and name of a number's bin; ``step`` is 1 for whole numbers (4-7) and 0 for others (4-8)."""
    place = sum(value >= edge for edge in edges)
    if place == 0:
        return 0, f"below {edges[0]}{unit}"
    if place == len(edges):
        return place, f"{edges[-1]} and more{unit}"
    return place, f"{edges[place - 1]}-{edges[place] - step}{unit}"


def script_of(text: str) -> str:
    """Return the script of a text's letters: ``"latin"``, ``"cyrillic"``, ``"cjk"``, ...

    ``"mixed"`` means several scripts; ``"digits"`` and ``"signs"`` mean that there are no letters.
    """
    # The first word of a letter's Unicode name is its script.
    scripts = Counter(unicodedata.name(letter, "other").split()[0].lower() for letter in text if letter.isalpha())
    if not scripts:
        return "digits" if any(letter.isdigit() for letter in text) else "signs"
    return next(iter(scripts)) if len(scripts) == 1 else "mixed"
