"""Compare two results on the same questions: the difference, its uncertainty, and the answers that changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llavar_peft.errors import DataError
from llavar_peft.evaluation.vqa.answer_metrics import LOWER_IS_BETTER, Score
from llavar_peft.evaluation.vqa.confidence_intervals import difference_interval, sign_test, sum_by_name
from llavar_peft.evaluation.vqa.diagnose_results import group_records
from llavar_peft.evaluation.vqa.scored_results import Answered, Results, Setting
from llavar_peft.types import ReadableRepr

Pair = tuple[Answered, Answered]


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference between two results on a group of records.

    Attributes:
        by: What the records are grouped by; empty for all records.
        name: The value that they have in common.
        records: Number of records.
        before: Figure of the first result, in percent.
        after: Figure of the second result.
        low: Lower end of the 95 % paired bootstrap interval of ``after - before``.
        high: Upper end.
        gained: Number of records on which the second is better.
        lost: Number of records on which the second is worse.
        p_value: Of the exact two-sided sign test.
    """

    by: str
    name: str
    records: int
    before: float
    after: float
    low: float
    high: float
    gained: int
    lost: int
    p_value: float

    @property
    def difference(self) -> float:
        """``after - before``, in points."""
        return self.after - self.before


@dataclass(frozen=True, slots=True)
class Change:
    """An answer that became better or worse.

    Attributes:
        id: Id of the question.
        question: Text of the question.
        truths: The correct answers.
        before: The first answer.
        after: The second answer.
        gained: Whether it became better.
    """

    id: str
    question: str
    truths: tuple[str, ...]
    before: str
    after: str
    gained: bool


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(ReadableRepr):
    """The comparison of two results.

    Attributes:
        protocol: The protocol that is compared.
        whole: The difference on all common records.
        groups: The differences on groups of records.
        changes: Answers that became better or worse, in the order of the questions.
        unpaired: Number of records that only one of the results has.
        settings: Settings that differ, by name: the first's and the second's value.
        first: How the first's answers were generated.
        second: How the second's answers were generated.
    """

    protocol: str
    whole: Difference
    groups: tuple[Difference, ...]
    changes: tuple[Change, ...]
    unpaired: int
    settings: dict[str, tuple[Any, Any]]
    first: Setting
    second: Setting

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as plain data for JSON."""
        plain = asdict(self)
        for entry, one in ((plain["whole"], self.whole), *zip(plain["groups"], self.groups, strict=True)):
            entry["difference"] = one.difference
        return plain


def compare_results(first: Results, second: Results, protocol: str) -> Comparison:
    """Compare two results question by question.

    Args:
        first: The earlier result.
        second: The later result.
        protocol: A protocol that both were scored by.

    Returns:
        The differences, second minus first.

    Raises:
        DataError: They have no question in common, have different questions under one id, or lack the scores.
    """
    for results in (first, second):
        if any(protocol not in record.scores for record in results.records):
            have = ", ".join(results.records[0].scores)
            raise DataError.at(
                results.dataset,
                f"was not scored by {protocol} (has {have})",
                "choose another --metric, or score the answers again",
            )
    others = {record.id: record for record in second.records}
    pairs = [(record, others[record.id]) for record in first.records if record.id in others]
    _check(pairs, first, second)
    by_id = {pair[0].id: pair for pair in pairs}
    groups = [
        _difference(by, name, [by_id[record.id] for record in members], protocol)
        for by, kinds in group_records([record for record, _ in pairs]).items()
        for name, members in kinds.items()
    ]
    changes = [
        Change(one.id, one.question, one.truths, one.answer, other.answer, better > 0)
        for one, other in pairs
        if (better := _better(one.scores[protocol], other.scores[protocol], protocol))
    ]
    before, after = asdict(first.setting), asdict(second.setting)
    return Comparison(
        protocol=protocol,
        whole=_difference("", "all", pairs, protocol),
        groups=tuple(groups),
        changes=tuple(changes),
        unpaired=len(first.records) + len(second.records) - 2 * len(pairs),
        settings={key: (before[key], after[key]) for key in before if before[key] != after[key]},
        first=first.setting,
        second=second.setting,
    )


def _check(pairs: Sequence[Pair], first: Results, second: Results) -> None:
    if not pairs:
        raise DataError.at(
            second.dataset, f"has no question in common with {first.dataset}", "compare results on the same data set"
        )
    for one, other in pairs:
        if one.question != other.question or sorted(one.truths) != sorted(other.truths):
            raise DataError.at(
                f"{second.dataset}:{one.id}",
                f"differs from the question in {first.dataset} (got {other.question!r}, expected {one.question!r})",
                "compare results on the same data set",
            )


def _better(before: Score, after: Score, protocol: str) -> int:
    """Return 1 if the second score is better, -1 if it is worse, else 0."""
    sign = (after.value > before.value) - (after.value < before.value)
    return -sign if protocol in LOWER_IS_BETTER else sign


def _difference(by: str, name: str, pairs: Sequence[Pair], protocol: str) -> Difference:
    scores = [(one.scores[protocol], other.scores[protocol]) for one, other in pairs]
    table = np.array([[one.points, one.out_of, other.points, other.out_of] for one, other in scores])
    before, before_of, after, after_of = table.T
    swapped = np.stack([after, after_of, before, before_of], axis=1)
    low, high = difference_interval(sum_by_name(swapped, [one.drawn_with for one, _ in pairs]))
    signs = [_better(one, other, protocol) for one, other in scores]
    gained, lost = signs.count(1), signs.count(-1)
    return Difference(
        by=by,
        name=name,
        records=len(pairs),
        before=100 * float(before.sum() / (before_of.sum() or 1.0)),
        after=100 * float(after.sum() / (after_of.sum() or 1.0)),
        low=100 * low,
        high=100 * high,
        gained=gained,
        lost=lost,
        p_value=sign_test(gained, lost),
    )
