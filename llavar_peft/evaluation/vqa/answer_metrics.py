"""Scoring protocols for answers. Close variants differ by several points, so each has its own name.

``multimodalocr``  the paper's: any truth is found as whole words, both normalized
``substring``      OCRBench's: any truth is found anywhere, in lower case
``vqa-accuracy``   VQA's, for ten annotators: min(agreeing / 3, 1), averaged over leaving out each annotator
``anls``           ST-VQA's and DocVQA's: 1 - normalized edit distance, 0 from a distance of 0.5
``exact``          the same text
``cer``, ``wer``   edits per character or word of the nearest truth; lower is better, and values above 1 are possible

The first three are published programs, which compare code points: a composed letter (NFC) and a decomposed one (NFD)
differ, as in the published figures. The others are formulas and compare texts by ``unify_text``: composed letters,
single spaces of any kind, nothing that has no shape. No protocol equates full-width and ordinary letters.

A truth without a visible character is never right. A truth that only normalization empties, such as ``{}``, is found in
every answer by ``multimodalocr``, which the published figures include.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, get_args

from rapidfuzz.distance import Levenshtein

from llavar_peft.data.text_metrics import exact_match, is_blank, unify_text
from llavar_peft.errors import DataError

Protocol = Literal["multimodalocr", "substring", "vqa-accuracy", "anls", "exact", "cer", "wer"]
PROTOCOLS: Final[tuple[Protocol, ...]] = get_args(Protocol)
LOWER_IS_BETTER: Final[frozenset[Protocol]] = frozenset({"cer", "wer"})

_ANNOTATORS: Final = 10
_ANLS_THRESHOLD: Final = 0.5


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one answer.

    Attributes:
        points: Points earned, or for ``cer`` and ``wer`` the number of edits.
        out_of: What the sum of points of a data set is divided by: 1, or the length of the truth.
    """

    points: float
    out_of: float = 1.0

    @property
    def value(self) -> float:
        """The score of this answer alone: 1 is full marks. The number of edits if ``out_of`` is 0, as in old files."""
        return self.points / self.out_of if self.out_of else self.points


def score(protocol: Protocol, answer: str, truths: Sequence[str]) -> Score:
    """Score an answer.

    Args:
        protocol: One of the protocols at the top of this file.
        answer: The model's answer.
        truths: The correct answers, in any order.

    Raises:
        DataError: All truths are blank, or there are not as many as the protocol needs.
    """
    visible = [truth for truth in truths if not is_blank(truth)]
    if not visible:
        raise DataError.at(
            protocol, f"an answer without a truth cannot be scored (got {list(truths)[:3]!r})", "remove its record"
        )
    if not applies(protocol, truths):
        raise DataError.at(
            protocol,
            f"needs the answers of {_ANNOTATORS} annotators (got {len(truths)})",
            "choose another protocol for this data: anls or multimodalocr",
        )
    return _SCORERS[protocol](answer, truths if protocol == "vqa-accuracy" else visible)


def applies(protocol: Protocol, truths: Sequence[str]) -> bool:
    """Return whether a record has the truths that a protocol needs."""
    if protocol == "vqa-accuracy" and len(truths) != _ANNOTATORS:
        return False
    return not all(map(is_blank, truths))


def contains_words(text: str, words: str) -> bool:
    r"""Return whether words occur in a text with a word boundary (``\b``) at both ends.

    Words that begin or end with a symbol (``$5``) are therefore found only where a letter or digit touches the symbol,
    and empty words are found in every text with a letter. The paper's numbers include both effects.

    Source: MultimodalOCR, ``has_word``.
    """
    return _whole_words(words).search(text) is not None


@lru_cache(maxsize=4096)
def _whole_words(words: str) -> re.Pattern[str]:
    return re.compile(rf"\b{re.escape(words)}\b")


def _multimodalocr(answer: str, truths: Sequence[str]) -> Score:
    """Count an answer as correct if any truth occurs in it as whole words, after VQA normalization of both.

    Source: MultimodalOCR, ``VQAEval.evaluate``; arXiv 2306.17107, Table 2.
    """
    normalized = normalize_answer(answer)
    return Score(float(any(contains_words(normalized, normalize_answer(truth)) for truth in truths)))


def _substring(answer: str, truths: Sequence[str]) -> Score:
    """Count an answer as correct if any truth occurs in it, in lower case, stripped, line breaks as spaces.

    Source: OCRBench, arXiv 2305.07895.
    """
    lowered = _lower(answer)
    return Score(float(any(_lower(truth) in lowered for truth in truths)))


def _lower(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _vqa_accuracy(answer: str, truths: Sequence[str]) -> Score:
    """Average min(n / 3, 1) over the ten sets of nine annotators, of whom n gave this answer after VQA normalization.

    Both sides are always normalized; the published program skips normalization where all ten annotators agree. An
    annotator who wrote nothing counts among the ten, and agrees with no answer.

    Source: visualqa.org/evaluation.html.
    """
    normalized = normalize_answer(answer)
    agreeing = sum(normalize_answer(truth) == normalized and not is_blank(truth) for truth in truths)
    # In `agreeing` of the ten sets, the annotator that is left out is one who agrees.
    total = agreeing * min((agreeing - 1) / 3, 1.0) + (len(truths) - agreeing) * min(agreeing / 3, 1.0)
    return Score(total / len(truths))


def _anls(answer: str, truths: Sequence[str]) -> Score:
    """Give 1 - normalized edit distance to the nearest truth, and nothing from a distance of 0.5.

    Both sides are in lower case and unified. A distance of exactly 0.5 gives nothing.

    Source: arXiv 1905.13648, equation 1.
    """
    lowered = unify_text(answer.lower())
    return Score(max(_similarity(lowered, unify_text(truth.lower())) for truth in truths))


def _similarity(answer: str, truth: str) -> float:
    distance = Levenshtein.normalized_distance(answer, truth)
    return 1.0 - distance if distance < _ANLS_THRESHOLD else 0.0


def _exact(answer: str, truths: Sequence[str]) -> Score:
    """Count an answer as correct if it equals any truth after ``unify_text``. Source: own protocol."""
    return Score(float(any(exact_match(answer, truth) for truth in truths)))


def _cer(answer: str, truths: Sequence[str]) -> Score:
    """Count character edits (insertions, deletions, substitutions) to the nearest truth, both unified.

    The figure of a data set is the sum of edits over the sum of the truths' lengths. Source: own protocol; the usual
    character error rate, case-sensitive.
    """
    return _nearest(unify_text(answer), [unify_text(truth) for truth in truths])


def _wer(answer: str, truths: Sequence[str]) -> Score:
    """Count word edits to the nearest truth; words are separated by white space.

    Source: own protocol; the usual word error rate, case-sensitive.
    """
    return _nearest(unify_text(answer).split(), [unify_text(truth).split() for truth in truths])


def _nearest(answer: Sequence[str], truths: Sequence[Sequence[str]]) -> Score:
    scores = [Score(float(Levenshtein.distance(answer, truth)), float(len(truth))) for truth in truths]
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

# -- the normalization of the VQA benchmark ---------------------------------------------------------------------------
# Source: visualqa.org/evaluation.html; MultimodalOCR, ``VQAEval``, which LLaVAR's numbers were measured with.

_PUNCTUATION: Final = ';/[]"{}()=+\\_-><@`,?!'
"""Without the apostrophe (possessives), the colon (times) and the full stop (decimals)."""
_NUMBER_BETWEEN_COMMAS: Final = re.compile(r"\d,\d")
_FULL_STOP: Final = re.compile(r"\.(?!\d)")
_FULL_STOPS_DROPPED: Final = 32
"""Both programs pass ``re.UNICODE``, whose value is 32, to ``sub`` in place of the number of replacements."""

_ARTICLES: Final = frozenset({"a", "an", "the"})
_DIGITS: Final = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip

# Contractions of "I" are missing: the programs look for them in capitals, after lowering the text.
_CONTRACTIONS: Final = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


_RESTORED: Final = {
    **{damaged: word for word in _CONTRACTIONS.split() for damaged in _without_one_apostrophe(word)},
    "somebody'd": "somebodyd",  # reversed in the programs; it affects answer and truth alike
}


def normalize_answer(text: str) -> str:
    """Normalize an answer or a truth as the VQA benchmark does.

    The text is lowered, full stops outside decimals are dropped, number words become digits, articles are dropped,
    missing apostrophes are restored, and other punctuation becomes a space or nothing. Quirks of the published programs
    are kept: punctuation is dropped rather than replaced by a space if the same sign touches a space anywhere in the
    text, or if the text has a comma between digits; only the first 32 full stops are dropped; ``none`` is 0.

    Returns:
        Words joined by single spaces; empty if the text has only articles and punctuation.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    joined = _NUMBER_BETWEEN_COMMAS.search(text) is not None
    signs = {ord(sign): "" if joined or f"{sign} " in text or f" {sign}" in text else " " for sign in _PUNCTUATION}
    text = _FULL_STOP.sub("", text.translate(signs), count=_FULL_STOPS_DROPPED)
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)
