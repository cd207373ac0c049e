"""Find texts that agree without comparing all pairs.

Almost blank pages look alike and contain little text, such as a page number, so that many pairs remain to compare. Two
texts at most k edits apart share one of any k + 1 pieces of the shorter one, at nearly the same position.

Source: Li, Deng, Wang, Feng, "Pass-Join", VLDB 2011.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice, pairwise
from typing import Final

from rapidfuzz import fuzz
from rapidfuzz.distance import Levenshtein

SAME_TEXT: Final = 0.2
"""Maximum character error rate between the texts of two copies."""
_FEW: Final = 64  # texts up to which comparing all pairs is faster than the index of pieces
_SHORT: Final = 48  # letters up to which pieces distinguish texts; longer texts have too many pieces
_ROUNDING: Final = 1e-9
_WORD: Final = re.compile(r"[^\W_]+")
_PART: Final = re.compile(r"\d+|\D+")
_SIMILAR_WORD: Final = 60.0  # of 100


def agree(first: str, second: str) -> bool:
    """Return whether two texts agree up to ``SAME_TEXT``."""
    return bool(Levenshtein.normalized_distance(first, second, score_cutoff=SAME_TEXT) <= SAME_TEXT)


def differ_in_facts(first: str, second: str) -> bool:
    """Return whether two texts differ in a number or a word, such as a date, and not only as readings of one image do.

    Each has a number that the other lacks, or a different one after the same word, or a word without a similar one in
    the other. A reading of a smaller copy lacks words and mistakes letters, but does not put others in their place.
    """
    one, other = _find_words(first), _find_words(second)
    rest, other_rest = list((one - other).elements()), list((other - one).elements())
    if any(word.isdigit() for word in rest) and any(word.isdigit() for word in other_rest):
        return True
    placed, other_placed = _find_numbers(first), _find_numbers(second)
    if {before for before, _ in placed - other_placed} & {before for before, _ in other_placed - placed}:
        return True
    return _has_strange_word(rest, second) and _has_strange_word(other_rest, first)


def _find_words(text: str) -> Counter[str]:
    """Return words and numbers. A single digit among letters may be a mistaken letter."""
    return Counter(
        part for word in _WORD.findall(text.casefold()) for part in _PART.findall(word) if _is_sure(part, word)
    )


def _is_sure(part: str, word: str) -> bool:
    return part == word or (part.isdigit() and len(part) > 1)


def _find_numbers(text: str) -> Counter[tuple[str, str]]:
    """Return the numbers that follow a word, with the word."""
    return Counter(
        (before, number)
        for before, number in pairwise(_WORD.findall(text.casefold()))
        if before.isalpha() and number.isdigit()
    )


def _has_strange_word(words: Iterable[str], text: str) -> bool:
    """Return whether some word is not even similar to a part of the text."""
    plain = "".join(text.casefold().split())
    return any(word.isalpha() and fuzz.partial_ratio(word, plain) < _SIMILAR_WORD for word in words if len(word) > 2)


def similar_texts(numbers: Sequence[int], texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield pairs of texts that may agree, in any order, including all pairs that do.

    Args:
        numbers: Indices of the texts to compare.
        texts: All texts.
    """
    ordered = sorted(numbers, key=lambda number: (len(texts[number]), number))
    if len(ordered) <= _FEW:
        yield from _by_length(ordered, texts, 0)
        return
    longer = next((place for place, number in enumerate(ordered) if len(texts[number]) > _SHORT), len(ordered))
    yield from _by_pieces(ordered[:longer], texts)
    yield from _by_length(ordered, texts, longer)


def _by_length(ordered: Sequence[int], texts: Sequence[str], start: int) -> Iterator[tuple[int, int]]:
    """Yield the pairs whose lengths allow agreement, with the longer text at ``start`` or later."""
    for place, first in enumerate(ordered):
        longest = len(texts[first]) / (1 - SAME_TEXT) + _ROUNDING
        for second in islice(ordered, max(place + 1, start), None):
            if len(texts[second]) > longest:
                break
            yield first, second


def _by_pieces(ordered: Sequence[int], texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield the pairs that share a piece; ``ordered`` has the shorter texts first."""
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
                # At other positions the rest of the text would need more edits than remain.
                first, last = start - (edits - longer) // 2, start + (edits + longer) // 2
                for place in range(max(0, first), min(last, len(text) - end + start) + 1):
                    met.update(index.get((length, number, text[place : place + end - start]), ()))
        yield from ((first, second) for first in met)
        lengths.add(len(text))
        for number, (start, end) in enumerate(_pieces(len(text))):
            index.setdefault((len(text), number, text[start:end]), []).append(second)


def _edits(length: int) -> int:
    """Return the maximum number of edits between agreeing texts, the longer of which has this length."""
    return math.floor(SAME_TEXT * length + _ROUNDING)


@lru_cache(maxsize=1024)
def _pieces(length: int) -> tuple[tuple[int, int], ...]:
    """Return the pieces of a text: one more than the edits to the longest text that may agree with it."""
    count = _edits(math.floor(length / (1 - SAME_TEXT) + _ROUNDING)) + 1
    edges = [length * number // count for number in range(count + 1)]
    return tuple(pairwise(edges))
