"""What results say about the next step: the figures to which the rules of ``llavar_peft.page.findings`` are applied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from llavar_peft.data.text_size import SMALLEST_LETTERS
from llavar_peft.evaluation.vqa.answer_metrics import LOWER_IS_BETTER
from llavar_peft.evaluation.vqa.confidence_intervals import ratio_intervals, sum_by_name
from llavar_peft.evaluation.vqa.diagnose_results import LETTER_HEIGHT, group_records
from llavar_peft.evaluation.vqa.scored_results import Answered, Results
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion
from llavar_peft.page.findings import (
    FEWEST_IN_PART,
    GAP,
    Finding,
    PartFigure,
    choose_findings,
    find_few_records,
    find_small_letters,
    find_weak_part,
)

if TYPE_CHECKING:
    from llavar_peft.evaluation.vqa.confidence_intervals import FloatArray
    from llavar_peft.recipe.resolution import CrossAttention, Tiles
    from llavar_peft.types import ImageMode

_FIELD: Final = "field "
_SMALLEST_PERCENTILE: Final = 5  # the letters of the lowest 5 % may stay too small, as in compare_resolutions
_LARGEST_SAMPLE: Final = 2000


def find_in_results(results: Results, protocol: str) -> tuple[Finding, ...]:
    """Return the findings of results by a protocol that they were scored by; none by one that counts errors."""
    figure = next((one for one in results.figures if one.protocol.startswith(protocol)), None)
    if protocol in LOWER_IS_BETTER or figure is None or protocol not in results.records[0].scores:
        return ()
    fields = _field_columns(results.records)
    compared, parts = _compare_fields(fields, results.records) if fields else _compare_kinds(results.records, protocol)
    advice = "add more records that have it" if fields else "add more records of this kind"
    return choose_findings(
        [
            _small_letters(results.records, protocol, results.resolution),
            find_weak_part(parts, compared, advice),
            find_few_records(figure.protocol, figure.records, figure.low, figure.high),
        ]
    )


def find_in_all(results: Sequence[tuple[Results, str]]) -> tuple[Finding, ...]:
    """Return the findings of several data sets, each with the protocol to read it by; two or more name their data."""
    found = [
        (Path(one.dataset).stem, finding) for one, protocol in results for finding in find_in_results(one, protocol)
    ]
    if len(results) < 2:
        return tuple(finding for _, finding in found)
    return choose_findings(Finding(finding.kind, f"{name}: {finding.text}") for name, finding in found)


def name_resolution(
    questions: Sequence[VqaQuestion], processor: Any, mode: ImageMode, own: Tiles | CrossAttention | None
) -> str | None:
    """Return the line of the recipe with the cheapest resolution that reads the text of questions.

    Args:
        questions: Those whose height and size of the image are given count.
        processor: The model's, or the side of the tower's input in pixels.
        mode: How images are prepared.
        own: The resolution of the model, of which only the settings can be changed; None if it has none.

    Returns:
        None if the heights are unknown, no resolution suffices, or none is needed.
    """
    from llavar_peft.data.image_views import ImageViews
    from llavar_peft.data.record_texts import RecordText
    from llavar_peft.models.compare_resolutions import compare_resolutions

    texts = []
    for question in questions[:: max(1, len(questions) // _LARGEST_SAMPLE)]:
        height = question.text_height or (question.box[3] - question.box[1] if question.box else None)
        if height is not None and question.size is not None:
            texts.append(RecordText((question.size,), ((0, height, 1.0),), 0))
    report = compare_resolutions(texts, ImageViews.of_model(processor, mode), own=own)
    if report is None or not report.reached or report.recommended[0].resolution is None:
        return None
    return report.recommended[0].recipe


def _small_letters(records: Sequence[Answered], protocol: str, setting: str | None) -> Finding | None:
    known = [record for record in records if record.letter_height is not None]
    small = [record.letter_height is not None and record.letter_height < SMALLEST_LETTERS for record in known]
    if not any(small) or all(small):
        return None
    table, names = _table(known, protocol), [record.drawn_with for record in known]
    heights = [record.letter_height for record in known if record.letter_height is not None]
    factor = SMALLEST_LETTERS / max(float(np.percentile(heights, _SMALLEST_PERCENTILE)), 1.0)
    part = _make_part("letters", "small", table, np.array(small), names)
    return find_small_letters(part, len(known), SMALLEST_LETTERS, factor, setting)


def _compare_kinds(records: Sequence[Answered], protocol: str) -> tuple[int, list[PartFigure]]:
    """Return the number of kinds of records that can be compared, and those that are clearly below the rest."""
    table, names = _table(records, protocol), [record.drawn_with for record in records]
    places = {record.id: place for place, record in enumerate(records)}
    compared, parts = 0, list[PartFigure]()
    for by, members in group_records(records).items():
        for name, chosen in members.items() if by != LETTER_HEIGHT else ():
            inside = np.zeros(len(records), dtype=bool)
            inside[[places[record.id] for record in chosen]] = True
            if inside.sum() >= FEWEST_IN_PART and not inside.all():
                compared += 1
                parts += _if_below(by.replace("_", " "), name, table, inside, names)
    return compared, parts


def _field_columns(records: Sequence[Answered]) -> list[str]:
    """Return the protocols of single fields, of results on forms with several."""
    names = [name for name in records[0].scores if name.startswith(_FIELD) and not name.endswith(" F1")]
    return names if len(names) > 1 else []


def _compare_fields(fields: Sequence[str], records: Sequence[Answered]) -> tuple[int, list[PartFigure]]:
    """Return the number of fields that can be compared, and those that are clearly below the others."""
    tables = [_table(records, name) for name in fields]
    names = [record.drawn_with for record in records]
    compared, parts = 0, list[PartFigure]()
    for place, name in enumerate(fields):
        others = np.concatenate([table for other, table in enumerate(tables) if other != place])
        table = np.concatenate([tables[place], others])
        inside = np.arange(len(table)) < len(records)
        if (tables[place][:, 1] > 0).sum() >= FEWEST_IN_PART:
            compared += 1
            parts += _if_below("field", name.removeprefix(_FIELD), table, inside, names * len(fields))
    return compared, parts


def _if_below(by: str, name: str, table: FloatArray, inside: np.ndarray, names: Sequence[Any]) -> Iterator[PartFigure]:
    """Yield the figure of a part if it is so far below the rest that its interval matters, which takes time."""
    if 100 * (_ratio(table[~inside]) - _ratio(table[inside])) >= GAP:
        yield _make_part(by, name, table, inside, names)


def _make_part(by: str, name: str, table: FloatArray, inside: np.ndarray, names: Sequence[Any]) -> PartFigure:
    ends = []
    for chosen in (inside, ~inside):
        rows = sum_by_name(table[chosen], [one for one, is_in in zip(names, chosen, strict=True) if is_in])
        ((low, high),) = ratio_intervals(rows[:, :1], rows[:, 1:])
        ends.append((100 * _ratio(table[chosen]), 100 * low, 100 * high))
    return PartFigure(by, name, int((table[inside][:, 1] > 0).sum()), *ends[0], *ends[1])


def _table(records: Sequence[Answered], protocol: str) -> FloatArray:
    return np.array([[record.scores[protocol].points, record.scores[protocol].out_of] for record in records])


def _ratio(table: FloatArray) -> float:
    points, out_of = table.sum(axis=0)
    return float(points / (out_of or 1.0))
