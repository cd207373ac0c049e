"""Finding texts that agree without comparing each with each.

Pages that are almost blank look alike and say little, each something else; a slide's title, a page's number. Two texts
that are at most k edits apart have one of any k + 1 pieces of the shorter one in common, at nearly the same place.

Source: Li, Deng, Wang, Feng, "Pass-Join", VLDB 2011.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice, pairwise
from typing import Final

from rapidfuzz.distance import Levenshtein

SAME_TEXT: Final = 0.2
"""Character error rate up to which two copies say the same."""
_FEW: Final = 64  # texts that are compared each with each in less time than pieces of them take
_SHORT: Final = 48  # letters up to which pieces tell texts apart; longer ones have too many
_ROUNDING: Final = 1e-9


def agree(first: str, second: str) -> bool:
    """Whether two texts say the same."""
    return bool(Levenshtein.normalized_distance(first, second, score_cutoff=SAME_TEXT) <= SAME_TEXT)


def similar_texts(numbers: Sequence[int], texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs among some texts that may agree; every pair that does is among them.

    Args:
        numbers: Which texts.
        texts: All.

    Yields:
        Two of ``numbers``, which pair comes in no certain order.
    """
    ordered = sorted(numbers, key=lambda number: (len(texts[number]), number))
    if len(ordered) <= _FEW:
        yield from _by_length(ordered, texts, 0)
        return
    longer = next((place for place, number in enumerate(ordered) if len(texts[number]) > _SHORT), len(ordered))
    yield from _by_pieces(ordered[:longer], texts)
    yield from _by_length(ordered, texts, longer)


def _by_length(ordered: Sequence[int], texts: Sequence[str], start: int) -> Iterator[tuple[int, int]]:
    """Pairs whose lengths allow it, of which the longer one stands at ``start`` or later."""
    for place, first in enumerate(ordered):
        longest = len(texts[first]) / (1 - SAME_TEXT) + _ROUNDING
        for second in islice(ordered, max(place + 1, start), None):
            if len(texts[second]) > longest:
                break
            yield first, second


def _by_pieces(ordered: Sequence[int], texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs of texts, the shorter ones first, that have a piece in common."""
    index: dict[tuple[int, int, str], list[int]] = {}
    lengths: set[int] = set()
    for second in ordered:
        text = texts[second]
        edits = _edits(len(text))
        met: set[int] = set()
        for length in lengths:
            if length < len(text) - edits:
                continue
            longer = len(text) - length
            for number, (start, end) in enumerate(_pieces(length)):
                # Beyond these places the rest of the text would need more edits than are left.
                first, last = start - (edits - longer) // 2, start + (edits + longer) // 2
                for place in range(max(0, first), min(last, len(text) - end + start) + 1):
                    met.update(index.get((length, number, text[place : place + end - start]), ()))
        yield from ((first, second) for first in met)
        lengths.add(len(text))
        for number, (start, end) in enumerate(_pieces(len(text))):
            index.setdefault((len(text), number, text[start:end]), []).append(second)


def _edits(length: int) -> int:
    """Edits at most between two texts that agree, the longer of which has this length."""
    return math.floor(SAME_TEXT * length + _ROUNDING)


@lru_cache(maxsize=1024)
def _pieces(length: int) -> tuple[tuple[int, int], ...]:
    """Where a text is cut: one piece more than there are edits to the longest text that may agree with it."""
    count = _edits(math.floor(length / (1 - SAME_TEXT) + _ROUNDING)) + 1
    edges = [length * number // count for number in range(count + 1)]
    return tuple(pairwise(edges))
