"""The ways of scoring an answer, by the name of the protocol: close variants differ by points, so each has a name.

``multimodalocr``  the paper's: any truth found as whole words, both normalised
``substring``      OCRBench's: any truth found anywhere, in lower case
``vqa-accuracy``   VQA's, of ten people's answers: all but one of them, averaged, min(agreeing / 3, 1)
``anls``           ST-VQA's and DocVQA's: 1 - normalised edit distance, 0 from a distance of 0.5 on
``exact``          the same letters, white space aside
``cer``, ``wer``   edits per character, per word of the nearest truth: lower is better, and above 1 is possible
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, get_args

from rapidfuzz.distance import Levenshtein

from llavar_peft.data.text_metrics import exact_match
from llavar_peft.errors import DataError
from llavar_peft.evaluation.vqa.vqa_normalization import normalise

Protocol = Literal["multimodalocr", "substring", "vqa-accuracy", "anls", "exact", "cer", "wer"]
PROTOCOLS: Final[tuple[Protocol, ...]] = get_args(Protocol)
LOWER_IS_BETTER: Final[frozenset[Protocol]] = frozenset({"cer", "wer"})

_PEOPLE: Final = 10
_ANLS_THRESHOLD: Final = 0.5


@dataclass(frozen=True, slots=True)
class Score:
    """What one answer got.

    Attributes:
        points: Reached, or for ``cer`` and ``wer`` edits made.
        out_of: What a set's figure divides the sum of points by: 1, or the truth's length.
    """

    points: float
    out_of: float = 1.0

    @property
    def value(self) -> float:
        """Of this answer alone: 1 is full marks; edits as they are where the truth is empty."""
        return self.points / self.out_of if self.out_of else self.points


def score(protocol: Protocol, answer: str, truths: Sequence[str]) -> Score:
    """Score an answer.

    Args:
        protocol: See the top of this file.
        answer: The model's.
        truths: Each a right answer; their order does not matter.

    Returns:
        Its score.

    Raises:
        DataError: There is no truth, or not the number of them that the protocol is about.
    """
    if not truths:
        raise DataError.at(protocol, "an answer without a truth cannot be scored", "leave its record out")
    if not applies(protocol, truths):
        raise DataError.at(
            protocol,
            f"is about the answers of {_PEOPLE} people (got {len(truths)})",
            "choose another protocol for this data: anls or multimodalocr",
        )
    return _SCORERS[protocol](answer, truths)


def applies(protocol: Protocol, truths: Sequence[str]) -> bool:
    """Whether a record has the truths that a protocol needs."""
    return len(truths) == _PEOPLE if protocol == "vqa-accuracy" else bool(truths)


def contains_words(text: str, words: str) -> bool:
    """Whether words are found in a text with a word's border at both ends.

    A border lies between a letter and a sign, so that words that begin or end with a sign (``$5``) are found only where
    a letter touches the sign; no words at all are found in any text with a letter. The paper's numbers contain both.

    Args:
        text: Looked in.
        words: Looked for.

    Returns:
        Whether they are there.

    Source: MultimodalOCR, ``has_word``.
    """
    return _whole_words(words).search(text) is not None


@lru_cache(maxsize=4096)
def _whole_words(words: str) -> re.Pattern[str]:
    return re.compile(rf"\b{re.escape(words)}\b")


def _multimodalocr(answer: str, truths: Sequence[str]) -> Score:
    """Source: MultimodalOCR, ``VQAEval.evaluate``; arXiv 2306.17107, Table 2."""
    said = normalise(answer)
    return Score(float(any(contains_words(said, normalise(truth)) for truth in truths)))


def _substring(answer: str, truths: Sequence[str]) -> Score:
    """Source: OCRBench, arXiv 2305.07895."""
    said = _flat(answer)
    return Score(float(any(_flat(truth) in said for truth in truths)))


def _flat(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _vqa_accuracy(answer: str, truths: Sequence[str]) -> Score:
    """Source: visualqa.org/evaluation.html. Always normalised; the program skips that where all ten agree."""
    said = normalise(answer)
    same = sum(normalise(truth) == said for truth in truths)
    # Of the sets that leave one person out, `same` leave out one who agrees.
    others = same * min((same - 1) / 3, 1.0) + (len(truths) - same) * min(same / 3, 1.0)
    return Score(others / len(truths))


def _anls(answer: str, truths: Sequence[str]) -> Score:
    """Source: arXiv 1905.13648, equation 1: a distance of just 0.5 gives nothing."""
    return Score(max(_similarity(_folded(answer), _folded(truth)) for truth in truths))


def _similarity(answer: str, truth: str) -> float:
    distance = Levenshtein.normalized_distance(answer, truth)
    return 1.0 - distance if distance < _ANLS_THRESHOLD else 0.0


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _exact(answer: str, truths: Sequence[str]) -> Score:
    return Score(float(any(exact_match(answer, truth) for truth in truths)))


def _cer(answer: str, truths: Sequence[str]) -> Score:
    return _nearest(" ".join(answer.split()), [" ".join(truth.split()) for truth in truths])


def _wer(answer: str, truths: Sequence[str]) -> Score:
    return _nearest(answer.split(), [truth.split() for truth in truths])


def _nearest(said: Sequence[str], truths: Sequence[Sequence[str]]) -> Score:
    scores = [Score(float(Levenshtein.distance(said, truth)), float(len(truth))) for truth in truths]
    return min(scores, key=lambda one: (one.value, one.points, one.out_of))


_SCORERS: Final[dict[Protocol, Callable[[str, Sequence[str]], Score]]] = {
    "multimodalocr": _multimodalocr,
    "substring": _substring,
    "vqa-accuracy": _vqa_accuracy,
    "anls": _anls,
    "exact": _exact,
    "cer": _cer,
    "wer": _wer,
}
