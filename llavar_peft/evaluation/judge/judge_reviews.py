"""Reviews by a judge, in the original's file format, and their summary.

A line is ``{"id", "question_id", "answer1_id", "answer2_id", "category", "content", "tuple": [reference's, ours]}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from llavar_peft.atomic_files import dump_json, write_text
from llavar_peft.errors import DAMAGED, DataError, describe_reason
from llavar_peft.evaluation.vqa.confidence_intervals import ratio_intervals
from llavar_peft.text_files import read_json_lines
from llavar_peft.types import expand_home

ALL: Final = "all"

Scores = tuple[float, float]
"""The reference's and ours, on the rule's scale of 1 to 10."""


@dataclass(frozen=True, slots=True)
class Review:
    """The judge's review of one question.

    Attributes:
        id: Position, from 1.
        answer1_id: Id of the reference's answer.
        answer2_id: Id of our answer.
        content: The judge's reply.
        scores: Parsed from the reply; None if it contains none.
        swapped_content: The judge's reply to the swapped order, if it was asked.
        swapped_scores: Parsed from that reply, the reference's first.
        settings: The judge's settings, and how our answer was generated, as far as that is known.
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
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Category:
    """Figures over the reviews of one kind of question.

    Attributes:
        name: The kind; ``"all"`` for all of them.
        reviews: Number of reviews with scores.
        reference: Mean score of the reference, to three places as in the original.
        ours: Mean score of our answers.
        ratio: Ours in percent of the reference's: the ratio of the means, not the mean of ratios; None if the
            reference's mean is 0.
        low: Lower end of the ratio's 95 % bootstrap interval.
        high: Upper end of that interval.
        both_orders: Number of reviews with scores in both orders, on which the next two figures are based.
        swapped_ratio: The ratio with our answer shown first.
        agreement: Percentage of questions with the same better answer, or a tie, in both orders.
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
    """Figures over a file of reviews.

    Attributes:
        categories: In the file's order, ``"all"`` last.
        unscored: Questions without scores, or without scores in the swapped order although it was asked. Missing
            scores enter no figure.
        settings: The distinct settings of the reviews.
    """

    categories: tuple[Category, ...]
    unscored: tuple[int | str, ...]
    settings: tuple[Mapping[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as a JSON-ready dictionary."""
        return asdict(self)


def summarize_reviews(reviews: Sequence[Review]) -> Summary:
    """Compute the paper's figures from the reviews of one model.

    Raises:
        DataError: No review has scores.

    Source: LLaVA, summarize_gpt_review.py.
    """
    scored = [review for review in reviews if review.scores is not None]
    if not scored:
        raise DataError.at("reviews", f"none of {len(reviews)} has scores", "check the judge's replies")
    names = list(dict.fromkeys(review.category for review in scored))
    groups = [(name, [review for review in scored if review.category == name]) for name in names]
    settings = [dict(review.settings) for review in reviews]
    return Summary(
        tuple(_summarize_category(name, members) for name, members in [*groups, (ALL, scored)]),
        tuple(review.question_id for review in reviews if _lacks_scores(review)),
        tuple(one for place, one in enumerate(settings) if one and one not in settings[:place]),
    )


def _lacks_scores(review: Review) -> bool:
    return review.scores is None or (review.swapped_content is not None and review.swapped_scores is None)


def _summarize_category(name: str, reviews: Sequence[Review]) -> Category:
    scores = [review.scores for review in reviews if review.scores is not None]
    table = np.array(scores, dtype=float)
    reference, ours, ratio = _means_and_ratio(scores)
    ((low, high),) = ratio_intervals(table[:, 1:], table[:, :1], counts=False)
    both = [(review.scores, review.swapped_scores) for review in reviews if review.scores and review.swapped_scores]
    same = sum(_better(one) == _better(other) for one, other in both)
    return Category(
        name=name,
        reviews=len(reviews),
        reference=reference,
        ours=ours,
        ratio=ratio,
        low=100 * low if reference else None,
        high=100 * high if reference else None,
        both_orders=len(both),
        swapped_ratio=_means_and_ratio([other for _, other in both])[2] if both else None,
        agreement=round(100 * same / len(both), 1) if both else None,
    )


def _means_and_ratio(scores: Sequence[Scores]) -> tuple[float, float, float | None]:
    reference, ours = (round(float(mean), 3) for mean in np.mean(np.array(scores, dtype=float), axis=0))
    return reference, ours, round(100 * ours / reference, 1) if reference else None


def _better(scores: Scores) -> int:
    return (scores[1] > scores[0]) - (scores[1] < scores[0])


def write_reviews(reviews: Sequence[Review], path: Path) -> None:
    """Write reviews in the original's format; ``tuple`` is null for a review without scores, never [-1, -1]."""
    write_text(path, "".join(dump_json(_as_json(review)) + "\n" for review in reviews))


def _as_json(review: Review) -> dict[str, Any]:
    value: dict[str, Any] = {
        "id": review.id,
        "question_id": review.question_id,
        "answer1_id": review.answer1_id,
        "answer2_id": review.answer2_id,
        "category": review.category,
        "content": review.content,
        "tuple": review.scores,
    }
    if review.swapped_content is not None:
        value["swapped"] = {"content": review.swapped_content, "tuple": review.swapped_scores}
    if review.settings:
        value["metadata"] = dict(review.settings)
    return value


def read_reviews(path: str | Path) -> tuple[Review, ...]:
    """Read reviews written by the original or by ``write_reviews``.

    The original writes [-1, -1] for a reply that it could not parse; such a review has no scores here.

    Raises:
        DataError: The file cannot be read, or a line is not a review.
    """
    return tuple(_from_json(value, where) for where, value in read_json_lines(expand_home(path), lenient=True))


def _from_json(value: Any, where: str) -> Review:
    try:
        swapped = value.get("swapped") or {}
        return Review(
            id=int(value["id"]),
            question_id=value["question_id"],
            answer1_id=value["answer1_id"],
            answer2_id=value["answer2_id"],
            category=str(value["category"]),
            content=str(value["content"]),
            scores=_read_scores(value["tuple"]),
            swapped_content=swapped.get("content"),
            swapped_scores=_read_scores(swapped.get("tuple")),
            settings=dict(value.get("metadata") or {}),
        )
    except DAMAGED as error:
        raise DataError.at(
            where, f"is not a review ({describe_reason(error)})", "correct the file, or download it again"
        ) from error


def _read_scores(value: Any) -> Scores | None:
    if value is None:
        return None
    first, second = (float(number) for number in value)
    return None if min(first, second) < 0 else (first, second)
