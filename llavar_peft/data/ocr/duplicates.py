"""Finding pictures that are in a folder twice: alike to the eye, and saying the same.

A perceptual hash alone takes two white pages for one. So two pictures are duplicates where their hashes are near AND
their texts agree; what hangs together through others is one group, of which the largest picture stays. The rule does
not know in which order pictures came.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Final

import numpy as np
from rapidfuzz.distance import Levenshtein

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE: Final = 16
BITS: Final = SIDE * SIDE
NEAR: Final = 12
"""Bits of 256 that may differ between two copies."""
SAME_TEXT: Final = 0.2
"""Character error rate below which two copies say the same."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A picture that may be a copy of another.

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
        The bits as a number; scaling and compressing a picture changes few of them.
    """
    from PIL import Image as Pillow

    small = image.convert("L").resize((SIDE + 1, SIDE), Pillow.Resampling.BOX)
    grey_HW = np.asarray(small, dtype=np.int16)
    return int.from_bytes(np.packbits(grey_HW[:, 1:] > grey_HW[:, :-1]).tobytes(), "big")


def find_duplicates(pictures: Sequence[Candidate]) -> Mapping[str, str]:
    """Says which pictures are copies of which.

    Args:
        pictures: In any order, with different paths.

    Returns:
        For each copy the path of the one that stays: of a group, the one with most pixels, then the first by name.
    """
    pictures = sorted(pictures, key=lambda one: (-one.pixels, one.path))
    texts = ["".join(picture.text.split()) for picture in pictures]
    root = list(range(len(pictures)))

    def find(number: int) -> int:
        while root[number] != number:
            root[number] = root[root[number]]
            number = root[number]
        return number

    for first, second in _near_pairs([picture.hash for picture in pictures], texts):
        one, other = sorted((find(first), find(second)))
        if one != other and _agree(texts[first], texts[second]):
            root[other] = one
    return {pictures[number].path: pictures[find(number)].path for number in range(len(root)) if find(number) != number}


def _agree(first: str, second: str) -> bool:
    return bool(Levenshtein.normalized_distance(first, second, score_cutoff=SAME_TEXT) <= SAME_TEXT)


def _near_pairs(hashes: Sequence[int], texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of near hashes; of NEAR + 1 bands of the bits such a pair has at least one in common."""
    edges = [round(BITS * band / (NEAR + 1)) for band in range(NEAR + 2)]
    for low, high in pairwise(edges):
        buckets: dict[int, list[tuple[int, int, int]]] = {}
        for number, (bits, text) in enumerate(zip(hashes, texts, strict=True)):
            buckets.setdefault(bits >> low & (1 << high - low) - 1, []).append((len(text), number, bits))
        for bucket in buckets.values():
            bucket.sort()
            for place, (length, first, bits) in enumerate(bucket):
                # White pages share many bands; texts whose lengths differ cannot agree.
                longest = length / (1 - SAME_TEXT)
                for other_length, second, other in islice(bucket, place + 1, None):
                    if other_length > longest:
                        break
                    if (bits ^ other).bit_count() <= NEAR:
                        yield first, second
