"""Find duplicate images in a folder: similar in appearance, and with the same text.

A perceptual hash alone takes two white pages for duplicates, and two posters that differ in the date. Two images are
therefore duplicates if their hashes are near and their texts agree, up to mistakes of reading. Of each connected group
the largest image is kept; the order of the images does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from llavar_peft.datagen.ocr.similar_texts import agree, differ_in_facts, similar_texts

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE: Final = 16
BITS: Final = SIDE * SIDE
NEAR: Final = 12
"""Maximum number of differing bits, of 256, between two copies."""
NOISE: Final = 12
"""Maximum difference in grey levels between squares of an empty page."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image that may be a copy of another, with its area in pixels and its ``difference_hash``."""

    path: str
    pixels: int
    hash: int
    text: str


def difference_hash(image: Image) -> int:
    """Return 256 bits: whether each of 16 x 16 cells is brighter than the one to its left.

    Scaling and compressing an image changes few of them.
    """
    from PIL import Image as Pillow

    small = image.convert("L").resize((SIDE + 1, SIDE), Pillow.Resampling.BOX)
    grey_HW = np.asarray(small, dtype=np.int16)
    return int.from_bytes(np.packbits(grey_HW[:, 1:] > grey_HW[:, :-1]).tobytes(), "big")


def is_blank(image: Image) -> bool:
    """Return whether squares of 8 x 8 pixels are all equally bright, up to a scanner's noise."""
    grey = image.convert("L")
    squares_HW = np.asarray(grey.reduce(8) if min(grey.size) >= 8 else grey, dtype=np.int16)
    return int(squares_HW.max() - squares_HW.min()) <= NOISE


def find_duplicates(images: Sequence[Candidate]) -> Mapping[str, str]:
    """Find copies among images with different paths.

    Returns:
        For each copy the path of the image to keep: the one with the most pixels, then the first by name.
    """
    images = sorted(images, key=lambda one: (-one.pixels, one.path))
    texts = ["".join(image.text.split()) for image in images]
    root = list(range(len(images)))

    def find(number: int) -> int:
        while root[number] != number:
            root[number] = root[root[number]]
            number = root[number]
        return number

    for first, second in _near_pairs([image.hash for image in images], texts):
        one, other = sorted((find(first), find(second)))
        if one != other and is_copy(images[first].text, images[second].text):
            root[other] = one
    return {images[number].path: images[find(number)].path for number in range(len(root)) if find(number) != number}


def is_copy(first: str, second: str) -> bool:
    """Return whether the texts of two images with near hashes show that one is a copy of the other."""
    return agree("".join(first.split()), "".join(second.split())) and not differ_in_facts(first, second)


def _near_pairs(hashes: Sequence[int], texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield pairs of near hashes whose texts may agree; some pairs repeat.

    Near hashes are equal in at least one of ``NEAR + 1`` bands of bits. A band takes bits from all over the image,
    because the bits of a margin are equal on all pages.
    """
    twins: dict[tuple[int, str], int] = {}
    for number, twin in enumerate(zip(hashes, texts, strict=True)):
        if twins.setdefault(twin, number) != number:
            yield twins[twin], number
    for band in range(NEAR + 1):
        mask = sum(1 << bit for bit in range(band, BITS, NEAR + 1))
        buckets: dict[int, list[int]] = {}
        for number in twins.values():
            buckets.setdefault(hashes[number] & mask, []).append(number)
        for bucket in buckets.values():
            for first, second in similar_texts(bucket, texts):
                if (hashes[first] ^ hashes[second]).bit_count() <= NEAR:
                    yield first, second
