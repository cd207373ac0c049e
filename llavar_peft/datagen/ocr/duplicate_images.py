"""Finding images that are in a folder twice: alike to the eye, and saying the same.

A perceptual hash alone takes two white pages for one. So two images are duplicates where their hashes are near AND
their texts agree; what hangs together through others is one group, of which the largest image stays. The rule does
not know in which order images came.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from llavar_peft.datagen.ocr.similar_texts import agree, similar_texts

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE: Final = 16
BITS: Final = SIDE * SIDE
NEAR: Final = 12
"""Bits of 256 that may differ between two copies."""
NOISE: Final = 12
"""Levels of grey that squares of an empty page may differ by."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An image that may be a copy of another.

    Attributes:
        path: Its name.
        pixels: Width times height.
        hash: Of 256 bits.
        text: What it says.
    """

    path: str
    pixels: int
    hash: int
    text: str


def difference_hash(image: Image) -> int:
    """256 bits: whether each of 16 x 16 cells is brighter than the one to its left.

    Args:
        image: RGB, of any size.

    Returns:
        The bits as a number; scaling and compressing an image changes few of them.
    """
    from PIL import Image as Pillow

    small = image.convert("L").resize((SIDE + 1, SIDE), Pillow.Resampling.BOX)
    grey_HW = np.asarray(small, dtype=np.int16)
    return int.from_bytes(np.packbits(grey_HW[:, 1:] > grey_HW[:, :-1]).tobytes(), "big")


def is_blank(image: Image) -> bool:
    """Whether an image shows nothing: squares of 8 x 8 pixels are all equally bright, up to a scanner's noise."""
    grey = image.convert("L")
    squares_HW = np.asarray(grey.reduce(8) if min(grey.size) >= 8 else grey, dtype=np.int16)
    return int(squares_HW.max() - squares_HW.min()) <= NOISE


def find_duplicates(images: Sequence[Candidate]) -> Mapping[str, str]:
    """Say which images are copies of which.

    Args:
        images: In any order, with different paths.

    Returns:
        For each copy the path of the one that stays: of a group, the one with most pixels, then the first by name.
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
        if one != other and agree(texts[first], texts[second]):
            root[other] = one
    return {images[number].path: images[find(number)].path for number in range(len(root)) if find(number) != number}


def _near_pairs(hashes: Sequence[int], texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of near hashes whose texts may agree; some come several times.

    Of NEAR + 1 bands of the bits a near pair has at least one in common. A band takes bits from all over the image:
    one that took those of the margin would be the same for all pages.
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
