"""Score the fields of forms: each field on its own, all of them, and by the protocols of SROIE and CORD.

``fields F1``       2 x right / (answered + true) over all fields, compared by ``normalize_value``
``fields right``    the share of true fields that are right
``documents right`` the share of documents whose fields are all right, with no other fields
``valid JSON``      the share of answers that are a JSON object or list; another answer has no field right
``CORD F1``         Donut's: as ``fields F1``, compared as texts
``CORD nTED``       Donut's accuracy by tree edit distance; see ``tree_distance``
``SROIE F1``, ``SROIE precision``, ``SROIE recall``   of ICDAR 2019, task 3: a field is right if its text is the same
``field NAME``, ``field NAME F1``   the share of documents in which a field is right, and its F1

Fields are named by their path; the entries of a list share the path of the list, and are compared in any order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from llavar_peft.errors import DataError
from llavar_peft.evaluation.fields.field_values import flatten, normalize_value, parse_fields
from llavar_peft.evaluation.fields.tree_distance import normalize_form, tree_accuracy
from llavar_peft.evaluation.vqa.answer_metrics import Score
from llavar_peft.evaluation.vqa.diagnose_results import Measure
from llavar_peft.evaluation.vqa.scored_results import Answered, Figure, Results, Setting, rate
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion

FIELDS: Final = "fields F1"
"""The first protocol of a file of results on forms, by which reports know one."""
_FIX: Final = "use records whose answer is a JSON object, as those of 'llavar-peft synth --task extract'"

Leaves: TypeAlias = "Counter[tuple[str, str]]"


def score_forms(
    questions: Sequence[VqaQuestion], dataset: str, setting: Setting, measures: Mapping[str, Measure] | None = None
) -> Results:
    """Score the answers about forms.

    Args:
        questions: Questions whose truth is JSON, with their answers.
        dataset: Name of the data set.
        setting: How the answers were generated.
        measures: Letter height and position by question id; see ``measure_letter_height``.

    Raises:
        DataError: A truth is not JSON, or no form has a field.
    """
    truths = [_read_truth(question) for question in questions]
    names = list(dict.fromkeys(path for truth in truths for path, _ in _leaves(truth)))
    if not names:
        raise DataError.at(dataset, "no form has a field that is not empty", _FIX)
    records = []
    for question, truth in zip(questions, truths, strict=True):
        answer = question.answer or ""
        scores = dict(_scores(parse_fields(answer), truth, names))
        height, position = (measures or {}).get(question.id, (None, None))
        records.append(
            Answered(
                question.id, question.question, answer, question.truths, question.image, question.fields, scores,
                height, position,
            )
        )  # fmt: skip
    # A field counts in the documents that have it.
    counts = {name: sum(record.scores[name].out_of > 0 for record in records) for name in _own(names)}
    figures = [
        Figure(name, *rate(records, name), counts.get(name, len(records)), False, setting) for name in records[0].scores
    ]
    return Results(dataset, setting, tuple(figures), tuple(records))


def _own(names: Sequence[str]) -> list[str]:
    """Return the protocols of single fields."""
    return [f"field {name}{kind}" for name in names for kind in ("", " F1")]


def compare_fields(answer: str, truth: str) -> Iterator[tuple[str, bool]]:
    """Yield the fields of an answer as lines of text, each with whether it is wrong, and those that are missing."""
    value, right = parse_fields(answer), _leaves(parse_fields(truth))
    if value is None:
        yield f"{answer}\n(no JSON)", True
        return
    for path, leaf in flatten(value):
        key = (path, normalize_value(leaf))
        if right[key] > 0 or not key[1]:
            right[key] -= 1
            yield f"{path}: {leaf}\n", False
        else:
            yield f"{path}: {leaf}\n", True
    for (path, leaf), count in right.items():
        if count > 0:
            yield f"{path}: missing ({leaf})\n", True


def _read_truth(question: VqaQuestion) -> Any:
    truth = parse_fields(question.truths[0])
    if truth is None:
        raise DataError.at(question.id, f"the correct answer is no JSON object (got {question.truths[0][:60]!r})", _FIX)
    return truth


def _leaves(value: Any) -> Leaves:
    """Count the fields by path and normalized value, without empty ones."""
    plain = ((path, normalize_value(leaf)) for path, leaf in flatten(value) if value is not None)
    return Counter(pair for pair in plain if pair[1])


def _texts(value: Any) -> Leaves:
    """Count the fields by path and stripped text, without empty ones."""
    plain = ((path, "" if leaf is None else str(leaf).strip()) for path, leaf in flatten(value) if value is not None)
    return Counter(pair for pair in plain if pair[1])


def _cord_texts(value: Any) -> Leaves:
    form = normalize_form(value if isinstance(value, Mapping | list) else {})
    return Counter((path, str(leaf)) for path, leaf in flatten(form))


def _scores(answer: Any, truth: Any, names: Sequence[str]) -> Iterator[tuple[str, Score]]:
    """Yield the score of one form by every protocol."""
    said, right = _leaves(answer), _leaves(truth)
    hits = (said & right).total()
    yield FIELDS, Score(2.0 * hits, said.total() + right.total())
    yield "fields right", Score(hits, right.total())
    yield "documents right", Score(float(said == right))
    yield "valid JSON", Score(float(answer is not None))
    cord, cord_right = _cord_texts(answer), _cord_texts(truth)
    yield "CORD F1", Score(2.0 * (cord & cord_right).total(), cord.total() + cord_right.total())
    yield "CORD nTED", Score(tree_accuracy(answer, truth))
    texts, exact = _texts(answer), _texts(truth)
    same = (texts & exact).total()
    yield "SROIE F1", Score(2.0 * same, texts.total() + exact.total())
    yield "SROIE precision", Score(same, texts.total())
    yield "SROIE recall", Score(same, exact.total())
    for name in names:
        one, other = (Counter({key: n for key, n in part.items() if key[0] == name}) for part in (said, right))
        present = float(bool(other))
        yield f"field {name}", Score(float(bool(other) and one == other), present)
        yield f"field {name} F1", Score(2.0 * (one & other).total(), one.total() + other.total())
