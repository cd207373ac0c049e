"""Reviews, as the original's judge wrote them, and what they come to.

A line is ``{"id", "question_id", "answer1_id", "answer2_id", "category", "content", "tuple": [reference's, ours]}``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from llavar_peft.atomic_files import dump_json, write_text
from llavar_peft.errors import DataError
from llavar_peft.evaluation.vqa.confidence_intervals import ratio_intervals

ALL: Final = "all"

Scores = tuple[float, float]
"""The reference's and ours, on the rule's scale of 1 to 10."""


@dataclass(frozen=True, slots=True)
class Review:
    """What the judge said of one question.

    Attributes:
        id: Its place, from 1.
        question_id: The question's.
        answer1_id: The reference's answer.
        answer2_id: Our answer.
        category: Which rule it was judged by.
        content: The judge's words.
        scores: Read from them; None where no reply could be read.
        swapped_content: The judge's words on our answer first, where it was asked.
        swapped_scores: Read from these, the reference's first again.
        how: Who judged, and how our answer was got, as far as it is known: names with values.
    """

    id: int
    question_id: int | str
    answer1_id: int | str
    answer2_id: int | str
    category: str
    content: str
    scores: Scores | None
    swapped_content: str | None = None
    swapped_scores: Scores | None = None
    how: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Category:
    """What the reviews of one kind of question come to.

    Attributes:
        name: The kind; ``"all"`` for all of them.
        reviews: How many have scores.
        reference: Mean score of the reference, to three places as in the original.
        ours: Mean score of ours.
        ratio: Ours in percent of the reference's: the ratio of the means, not the mean of ratios; None where the
            reference got nothing.
        low: Lower end of the ratio's 95 % bootstrap interval.
        high: Upper end.
        swapped_ratio: The ratio with our answer shown first.
        both_orders: How many have scores in both orders; the next two are of these.
        agreement: Percent of the questions whose better answer, or tie, is the same in both orders.
    """

    name: str
    reviews: int
    reference: float
    ours: float
    ratio: float | None
    low: float | None
    high: float | None
    both_orders: int = 0
    swapped_ratio: float | None = None
    agreement: float | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """What a file of reviews comes to.

    Attributes:
        categories: In the file's order, and all of them last.
        unscored: Questions whose review has no scores, or not in the order that was asked for a second time; what is
            missing enters nothing.
        settings: Who judged, and how our answers were got: each way that occurs.
    """

    categories: tuple[Category, ...]
    unscored: tuple[int | str, ...]
    settings: tuple[Mapping[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return asdict(self)


def summarize_reviews(reviews: Sequence[Review]) -> Summary:
    """Take the figures that the paper gives.

    Args:
        reviews: Of one model.

    Returns:
        Means and their ratio for each kind of question.

    Raises:
        DataError: No review has scores.

    Source: LLaVA, summarize_gpt_review.py.
    """
    scored = [review for review in reviews if review.scores is not None]
    if not scored:
        raise DataError.at("reviews", f"none of {len(reviews)} has scores", "look at what the judge replied")
    names = list(dict.fromkeys(review.category for review in scored))
    kinds = [(name, [review for review in scored if review.category == name]) for name in names]
    ways = [dict(review.how) for review in reviews]
    return Summary(
        tuple(_category(name, members) for name, members in [*kinds, (ALL, scored)]),
        tuple(review.question_id for review in reviews if _lacks_scores(review)),
        tuple(how for place, how in enumerate(ways) if how and how not in ways[:place]),
    )


def _lacks_scores(review: Review) -> bool:
    return review.scores is None or (review.swapped_content is not None and review.swapped_scores is None)


def _category(name: str, reviews: Sequence[Review]) -> Category:
    table = np.array([review.scores for review in reviews], dtype=float)
    reference, ours = (round(float(mean), 3) for mean in table.mean(axis=0))
    ((low, high),) = ratio_intervals(table[:, 1:], table[:, :1])
    both = [(review.scores, review.swapped_scores) for review in reviews if review.scores and review.swapped_scores]
    same = sum(_better(one) == _better(other) for one, other in both)
    return Category(
        name=name,
        reviews=len(reviews),
        reference=reference,
        ours=ours,
        ratio=round(100 * ours / reference, 1) if reference else None,
        low=100 * low if reference else None,
        high=100 * high if reference else None,
        both_orders=len(both),
        swapped_ratio=_ratio([other for _, other in both]) if both else None,
        agreement=round(100 * same / len(both), 1) if both else None,
    )


def _ratio(scores: Sequence[Scores]) -> float | None:
    reference, ours = (round(float(mean), 3) for mean in np.mean(np.array(scores, dtype=float), axis=0))
    return round(100 * ours / reference, 1) if reference else None


def _better(scores: Scores) -> int:
    return (scores[1] > scores[0]) - (scores[1] < scores[0])


def write_reviews(reviews: Sequence[Review], path: Path) -> None:
    """Write reviews in the original's form; ``tuple`` is null where there are no scores, never [-1, -1]."""
    write_text(path, "".join(dump_json(_plain(review)) + "\n" for review in reviews))


def _plain(review: Review) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "id": review.id,
        "question_id": review.question_id,
        "answer1_id": review.answer1_id,
        "answer2_id": review.answer2_id,
        "category": review.category,
        "content": review.content,
        "tuple": review.scores,
    }
    if review.swapped_content is not None:
        plain["swapped"] = {"content": review.swapped_content, "tuple": review.swapped_scores}
    if review.how:
        plain["metadata"] = dict(review.how)
    return plain


def read_reviews(path: str | Path) -> tuple[Review, ...]:
    """Read reviews, the original's or ours.

    Args:
        path: JSON lines.

    Returns:
        The reviews. The original writes [-1, -1] for a reply that it could not read: these have no scores here.

    Raises:
        DataError: It cannot be read, or a line is no review.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # not splitlines: words may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise DataError.at(str(path), f"cannot be read ({error})", "correct the path") from error
    return tuple(_read(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip())


def _read(line: str, where: str) -> Review:
    try:
        plain = json.loads(line)
        swapped = plain.get("swapped") or {}
        return Review(
            id=int(plain["id"]),
            question_id=plain["question_id"],
            answer1_id=plain["answer1_id"],
            answer2_id=plain["answer2_id"],
            category=str(plain["category"]),
            content=str(plain["content"]),
            scores=_scores(plain["tuple"]),
            swapped_content=swapped.get("content"),
            swapped_scores=_scores(swapped.get("tuple")),
            how=dict(plain.get("metadata") or {}),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError.at(where, f"is no review ({error!r})", "write or fetch the file again") from error


def _scores(value: Any) -> Scores | None:
    if value is None:
        return None
    first, second = (float(number) for number in value)
    return None if min(first, second) < 0 else (first, second)
