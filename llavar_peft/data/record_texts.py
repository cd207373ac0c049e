"""The text in the images of records: how high its letters are, where a record or a reading says so.

Each record counts as one, whatever the number of lines that are known of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeAlias

import numpy as np

from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.record_store import RecordSource, parse_record
from llavar_peft.data.text_size import read_text_size
from llavar_peft.errors import DataError, ImageError
from llavar_peft.types import ImageSource

Size: TypeAlias = tuple[int, int]
"""(width, height) of an image in pixels."""

LARGEST_SAMPLE: Final = 2000
"""Number of records whose text is measured; more would take minutes and give the same shares."""
_SAMPLE_STREAM: Final = 0x7E5
_MOST_IMAGES: Final = 64  # of a record that are measured: one may name a million


@dataclass(frozen=True, slots=True)
class ImageLines:
    """The lines of text in an image, as they were read.

    Attributes:
        size: (width, height) of the image in pixels.
        lines: (height of its letters in pixels, number of its letters) of each line.
    """

    size: Size
    lines: tuple[tuple[float, int], ...]


ReadsLines: TypeAlias = Callable[[ImageSource, ImageRoots], ImageLines | None]
"""Returns the lines of an image; None if it was not read, or cannot be."""


@dataclass(frozen=True, slots=True)
class RecordText:
    """The text in a record's images.

    Attributes:
        sizes: (width, height) of each of its images in pixels.
        lines: Of each line its image, by number, the height of its letters in pixels of the image, and its share of
            the record's text; empty if nothing is known.
        other_tokens: Estimated number of the record's tokens without those of images.
    """

    sizes: tuple[Size, ...]
    lines: tuple[tuple[int, float, float], ...]
    other_tokens: int


@dataclass(frozen=True, slots=True)
class TextSample:
    """The text of some records, drawn at random.

    Attributes:
        texts: The text of each record where it is known.
        unknown: Indices of the records with images of whose text nothing is known.
        drawn: Number of records with images in the sample.
    """

    texts: tuple[RecordText, ...]
    unknown: tuple[int, ...]
    drawn: int


def sample_texts(
    records: RecordSource,
    roots_of: Callable[[int], ImageRoots],
    *,
    indices: Sequence[int] | None = None,
    count: int = LARGEST_SAMPLE,
    seed: int = 0,
    read: ReadsLines | None = None,
    stated: bool = True,
    progress: Callable[[int], None] | None = None,
) -> TextSample:
    """Find out how high the letters of some records are.

    Records and images that cannot be read are left out: to report them is the purpose of other checks.

    Args:
        records: The records.
        roots_of: Returns the image folders of a record, by its index. An image is opened if its size is not stated.
        indices: Indices of the records to draw from; None for all.
        count: Number of records to draw.
        seed: Seed of the draw.
        read: Reads the lines of an image, which are preferred to what the record states.
        stated: Whether to use the heights that records state (``text_height`` or ``box``).
        progress: Called with the number of records done.
    """
    pool = np.arange(len(records)) if indices is None else np.asarray(indices, dtype=np.int64)
    rng = np.random.default_rng((seed, _SAMPLE_STREAM))
    drawn = pool if len(pool) <= count else np.sort(rng.choice(pool, count, replace=False))
    texts, unknown, sizes = list[RecordText](), list[int](), dict[ImageSource, Size]()
    for done, index in enumerate(drawn.tolist()):
        if progress is not None:
            progress(done)
        try:
            raw = records[index]
            images = parse_record(raw, records.where(index)).images[:_MOST_IMAGES]
        except DataError:
            continue
        if not images:
            continue
        text = None if read is None else _read_text(images, roots_of(index), read)
        if text is None and stated:
            text = _stated_text(raw, images, roots_of(index), sizes)
        if text is None:
            unknown.append(index)
        else:
            texts.append(replace(text, other_tokens=_other_tokens(raw)))
    return TextSample(tuple(texts), tuple(unknown), len(texts) + len(unknown))


def _read_text(images: Sequence[ImageSource], roots: ImageRoots, read: ReadsLines) -> RecordText | None:
    """Return the text of images that were all read, and in which there is some."""
    readings = [reading for reading in (read(image, roots) for image in images) if reading is not None]
    letters = sum(number for reading in readings for _, number in reading.lines)
    if len(readings) < len(images) or not letters:
        return None
    lines = [
        (place, height, number / letters) for place, reading in enumerate(readings) for height, number in reading.lines
    ]
    return RecordText(tuple(reading.size for reading in readings), tuple(lines), 0)


def _stated_text(
    raw: Any, images: Sequence[ImageSource], roots: ImageRoots, known: dict[ImageSource, Size]
) -> RecordText | None:
    """Return what a record states of its text, which is that of its first image."""
    if not isinstance(raw, Mapping):
        return None
    try:
        size = read_text_size(raw, "record")
        box, height = size["box"], size["text_height"]
        if height is None and box is not None:
            height = box[3] - box[1]
        if height is None:
            return None
        if size["size"] is not None and len(images) == 1:
            return RecordText((size["size"],), ((0, height, 1.0),), 0)
        sizes = []
        for image in images:
            if image not in known:
                known[image] = roots.open(image).size
            sizes.append(known[image])
    except (DataError, ImageError):
        return None
    return RecordText(tuple(sizes), ((0, height, 1.0),), 0)


def _other_tokens(raw: Any) -> int:
    # It imports torch, which a check of records without known text does not need.
    from llavar_peft.data.training_dataset import text_tokens

    return text_tokens(raw)
