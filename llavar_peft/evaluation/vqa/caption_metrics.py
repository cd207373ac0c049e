"""METEOR, ROUGE-L and CIDEr, the metrics of the paper's appendix D (arXiv 2306.17107).

All three compare words. They are NLTK's, in lower case and without the punctuation that the COCO caption evaluation
drops; a text of nothing but such punctuation keeps it. The paper's figures come close to those of the COCO tool, which
needs Java for its tokenizer and for METEOR. ``docs/reproducing.md`` says how close each variant comes.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, TypeAlias

from rapidfuzz.distance import LCSseq

from llavar_peft.errors import MissingDependencyError

Words: TypeAlias = list[str]
NgramCounts: TypeAlias = "Counter[tuple[str, ...]]"

_DROPPED: Final = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'})
_ROUGE_BETA: Final = 1.2
_LONGEST_NGRAM: Final = 4
_CIDER_SIGMA: Final = 6.0
_CIDER_SCALE: Final = 10.0

# Source: Denkowski and Lavie 2014, the weights for English of METEOR 1.5.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_STEM_WEIGHT: Final = 0.6

_FUNCTION_WORDS: Final = """
    a about after all also an and any are as at back be because been before between but by can could did do down even
    first for from had has have he her him his how i if in into is it its just like made make many may me more most much
    must my new no not now of off on one only or other our out over own said same see she should so some state still
    such take than that the their them then there these they this those through time to too two under up us used very
    was way we well were what when where which while who will with would years you your 's n't $ %
"""
"""Words that are more than a thousandth of English text, which METEOR gives a lower weight."""


def tokenize(text: str) -> Words:
    """Return the words of a text, in lower case.

    Raises:
        MissingDependencyError: NLTK is not installed.
    """
    words: Words = _nltk().tokenize(text.lower())
    return [word for word in words if word not in _DROPPED] or words


def rouge_l(answer: Words, truths: Sequence[Words]) -> float:
    """Return the F-measure of the longest common subsequence, from 0 to 1.

    Precision and recall are each the best over the truths; recall weighs 1.2 squared times as much.

    Source: Lin 2004, as in the COCO caption evaluation.
    """
    common = [LCSseq.similarity(answer, truth) for truth in truths]
    precision = max((count / len(answer) for count in common if count), default=0.0)
    recall = max((count / len(truth) for count, truth in zip(common, truths, strict=True) if count), default=0.0)
    weighted = recall + _ROUGE_BETA**2 * precision
    return (1 + _ROUGE_BETA**2) * precision * recall / weighted if weighted else 0.0


def meteor(answer: Words, truths: Sequence[Words]) -> float:
    """Return METEOR 1.5 of the best truth, from 0 to 1, with exact and stem matches.

    Synonyms and paraphrases, which METEOR also matches, need WordNet and tables that no package contains.

    Source: Denkowski and Lavie 2014; the words are aligned by NLTK.
    """
    return max(_meteor(answer, truth) for truth in truths)


def _meteor(answer: Words, truth: Words) -> float:
    matches = sorted(_nltk().align(answer, truth))
    if not matches:
        return 0.0
    kind = [1.0 if answer[place] == truth[other] else _STEM_WEIGHT for place, other in matches]
    precision = sum(_weight(answer[place]) * one for (place, _), one in zip(matches, kind, strict=True))
    recall = sum(_weight(truth[other]) * one for (_, other), one in zip(matches, kind, strict=True))
    precision, recall = precision / sum(map(_weight, answer)), recall / sum(map(_weight, truth))
    mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    chunks = 1 + sum(after != (place + 1, other + 1) for (place, other), after in pairwise(matches))
    whole = chunks == 1 and len(matches) == len(answer) == len(truth)
    return mean * (1 - (0.0 if whole else _GAMMA * (chunks / len(matches)) ** _BETA))


@lru_cache(maxsize=1)
def _function_words() -> frozenset[str]:
    return frozenset(_FUNCTION_WORDS.split())


def _weight(word: str) -> float:
    return 1 - _DELTA if word in _function_words() else _DELTA


def cider(answers: Sequence[Words], truths: Sequence[Sequence[Words]]) -> list[float]:
    """Return the CIDEr-D of each answer, from 0 to 10.

    Sequences of words weigh the more, the fewer records have them in their truths: the score of an answer depends on
    all records, and is 0 for a single one.

    Source: arXiv 1411.5726, as in the COCO caption evaluation.
    """
    counted = [[_count_ngrams(truth) for truth in every] for every in truths]
    frequency = Counter(ngram for every in counted for ngram in set().union(*every))
    rarity = {ngram: math.log(len(answers) / count) for ngram, count in frequency.items()}
    unseen = math.log(len(answers))
    return [
        sum(_similarity(_count_ngrams(answer), truth, rarity, unseen) for truth in every) / len(every)
        for answer, every in zip(answers, counted, strict=True)
    ]


def _count_ngrams(words: Words) -> NgramCounts:
    return Counter(
        tuple(words[start : start + length])
        for length in range(1, _LONGEST_NGRAM + 1)
        for start in range(len(words) - length + 1)
    )


def _similarity(
    answer: NgramCounts, truth: NgramCounts, rarity: Mapping[tuple[str, ...], float], unseen: float
) -> float:
    """Return the mean over the lengths of n-grams of the clipped cosine, less for texts of different length."""
    ours, theirs = (
        {ngram: count * rarity.get(ngram, unseen) for ngram, count in part.items()} for part in (answer, truth)
    )
    products: dict[int, float] = defaultdict(float)
    squares = [defaultdict[int, float](float), defaultdict[int, float](float)]
    for ngram, weight in ours.items():
        products[len(ngram)] += min(weight, theirs.get(ngram, 0.0)) * theirs.get(ngram, 0.0)
    for total, part in zip(squares, (ours, theirs), strict=True):
        for ngram, weight in part.items():
            total[len(ngram)] += weight * weight
    cosines = sum(
        product / math.sqrt(squares[0][length] * squares[1][length])
        for length, product in products.items()
        if squares[0][length] and squares[1][length]
    )
    # The length is the number of pairs of words, as in the COCO tool.
    difference = sum(
        count * sign for part, sign in ((answer, 1), (truth, -1)) for ngram, count in part.items() if len(ngram) == 2
    )
    return _CIDER_SCALE / _LONGEST_NGRAM * cosines * math.exp(-(difference**2) / (2 * _CIDER_SIGMA**2))


class _Nltk:
    """The parts of NLTK that need no data."""

    def __init__(self) -> None:
        try:
            from nltk.stem import SnowballStemmer
            from nltk.tokenize import NLTKWordTokenizer
            from nltk.translate.meteor_score import align_words
        except ImportError as error:
            raise MissingDependencyError.at(
                "--metric",
                f"meteor, rouge-l and cider need the package nltk ({error})",
                "pip install 'llavar-peft[eval]'",
            ) from error
        self.tokenize: Callable[[str], Words] = NLTKWordTokenizer().tokenize
        self.stem: Callable[[str], str] = lru_cache(maxsize=65536)(SnowballStemmer("english").stem)
        self._align = align_words

    def align(self, answer: Words, truth: Words) -> list[tuple[int, int]]:
        """Return the pairs of places of words that match."""
        matches: list[tuple[int, int]] = self._align(answer, truth, stemmer=self, wordnet=self)[0]
        return matches

    def synsets(self, word: str) -> list[Any]:
        """Return no synonyms, in the place of WordNet."""
        return []


@lru_cache(maxsize=1)
def _nltk() -> _Nltk:
    return _Nltk()
