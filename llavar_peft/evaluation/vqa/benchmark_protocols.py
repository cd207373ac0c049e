"""Protocols that are computed when they are asked for, because they suit one benchmark or one question.

``meteor``, ``rouge-l``, ``cider``   of the paper's appendix D; see ``caption_metrics``
``long-correct``   of truths longer than ten characters, the share that occurs in the answer (appendix I)
``long-partial``   of these, the share that occurs in part: at most half of its characters are wrong
``relaxed``        ChartQA's: a number within 5 % of the truth, or the same text
``scienceqa``      the letter of the chosen option; computed without being asked for if all questions list options
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Final, Literal, cast, get_args

from rapidfuzz.distance import Levenshtein

from llavar_peft.data.text_metrics import is_blank, unify_text
from llavar_peft.errors import DataError
from llavar_peft.evaluation.vqa.answer_metrics import Protocol, Score, score
from llavar_peft.evaluation.vqa.caption_metrics import Words, cider, meteor, rouge_l, tokenize

BenchmarkProtocol = Literal["meteor", "rouge-l", "cider", "long-correct", "long-partial", "relaxed", "scienceqa"]
BENCHMARK_PROTOCOLS: Final[tuple[BenchmarkProtocol, ...]] = get_args(BenchmarkProtocol)
OPTIONS: Final = "ABCDE"
"""Letters of the options of ScienceQA."""

_CAPTION: Final = frozenset({"meteor", "rouge-l", "cider"})
_LONG: Final = 10  # characters
_PARTIAL: Final = 0.5
_TOLERANCE: Final = 0.05
_FIRST_OPTION: Final = re.compile(r"\(A\) |^A[.)] ", re.MULTILINE)
_CHOSEN: Final = re.compile(r"The answer is \(?([A-E])\b")


def score_column(
    protocol: Protocol | BenchmarkProtocol, answers: Sequence[str], truths: Sequence[Sequence[str]]
) -> list[Score]:
    """Score all answers of a data set by one protocol.

    Raises:
        DataError: A record does not have the truths that the protocol needs.
        MissingDependencyError: The protocol needs a package that is not installed.
    """
    pairs = list(zip(answers, truths, strict=True))
    if protocol not in BENCHMARK_PROTOCOLS:
        return [score(cast(Protocol, protocol), answer, every) for answer, every in pairs]
    visible = [[truth for truth in every if not is_blank(truth)] for every in truths]
    if not all(visible):
        raise DataError.at(protocol, "an answer without a truth cannot be scored (all are blank)", "remove its record")
    if protocol in _CAPTION:
        return [Score(value) for value in _caption_scores(protocol, answers, visible)]
    scored = [_SCORERS[protocol](answer, every) for answer, every in zip(answers, visible, strict=True)]
    if not any(one.out_of for one in scored):
        raise DataError.at(
            protocol, f"no truth is longer than {_LONG} characters", "choose another protocol for this data"
        )
    return scored


def check_packages(protocols: Sequence[str]) -> None:
    """Check that the packages of protocols are installed, before answers are generated.

    Raises:
        MissingDependencyError: One is not.
    """
    if not _CAPTION.isdisjoint(protocols):
        tokenize("")


def is_multiple_choice(questions: Sequence[str], truths: Sequence[Sequence[str]]) -> bool:
    """Return whether all questions of a data set list options, ``(A)`` or ``A.``, and all truths are their letters."""
    letters = all(len(every) == 1 and _is_option(every[0]) for every in truths)
    return letters and all(_FIRST_OPTION.search(question) for question in questions)


def _is_option(truth: str) -> bool:
    return len(truth) == 1 and truth in OPTIONS


def _caption_scores(protocol: str, answers: Sequence[str], truths: Sequence[Sequence[str]]) -> list[float]:
    said: list[Words] = [tokenize(answer) for answer in answers]
    right = [[tokenize(truth) for truth in every] for every in truths]
    if protocol == "cider":
        return cider(said, right)
    return list(map(meteor if protocol == "meteor" else rouge_l, said, right))


def _long_similarity(answer: str, truths: Sequence[str]) -> float | None:
    """Return the best similarity of a long truth to the parts of the answer of its length; None without a long truth.

    The similarity is 1 - edits / characters, in lower case. A shorter answer is compared as a whole.

    Source: arXiv 2306.17107, appendix I.
    """
    said = unify_text(answer.lower())
    long = [text for truth in truths if len(text := unify_text(truth.lower())) > _LONG]
    parts = ((truth, said[start : start + len(truth)]) for truth in long for start in _starts(said, truth))
    return max((Levenshtein.normalized_similarity(part, truth) for truth, part in parts), default=None)


def _starts(said: str, truth: str) -> range:
    return range(max(1, len(said) - len(truth) + 1))


def _long_correct(answer: str, truths: Sequence[str]) -> Score:
    similarity = _long_similarity(answer, truths)
    return Score(float(similarity == 1), float(similarity is not None))


def _long_partial(answer: str, truths: Sequence[str]) -> Score:
    similarity = _long_similarity(answer, truths)
    return Score(float(similarity is not None and _PARTIAL <= similarity < 1), float(similarity is not None))


def _relaxed(answer: str, truths: Sequence[str]) -> Score:
    """Count an answer as correct if it is a number within 5 % of a truth, or the same text in lower case.

    ``12 %`` is 0.12. The truth 0 needs the same text. Source: arXiv 2203.10244, section 5.1, as in Pix2Struct.
    """
    return Score(float(any(_is_close(unify_text(answer), unify_text(truth)) for truth in truths)))


def _is_close(answer: str, truth: str) -> bool:
    said, right = _read_number(answer), _read_number(truth)
    if said is not None and right:
        return abs(said - right) <= _TOLERANCE * abs(right)
    return answer.lower() == truth.lower()


def _read_number(text: str) -> float | None:
    percent = text.endswith("%")
    try:
        number = float(text.rstrip("% ")) / (100 if percent else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _scienceqa(answer: str, truths: Sequence[str]) -> Score:
    """Count an answer as correct if it chooses the letter of the truth.

    The letter stands alone, at the start before a full stop and a space, or once in ``The answer is B``. The original
    guesses an option where it finds no letter; here such an answer is wrong.

    Source: LLaVA, eval_science_qa.py.
    """
    if not all(map(_is_option, truths)):
        raise DataError.at(
            "scienceqa",
            f"a truth is not the letter of an option (got {truths[0][:40]!r}, expected one of {', '.join(OPTIONS)})",
            "choose another protocol for this data",
        )
    return Score(float(read_option(answer) in truths))


def read_option(answer: str) -> str | None:
    """Return the letter that an answer chooses; None if it chooses none."""
    said = answer.strip().replace("\n", ". ")
    alone = said.removesuffix(".").strip("()")
    if _is_option(alone):
        return alone
    if said[1:3] == ". " and _is_option(said[0]):
        return said[0]
    found = set(_CHOSEN.findall(said))
    return found.pop() if len(found) == 1 else None


_SCORERS: Final[dict[str, Callable[[str, Sequence[str]], Score]]] = {
    "long-correct": _long_correct,
    "long-partial": _long_partial,
    "relaxed": _relaxed,
    "scienceqa": _scienceqa,
}
