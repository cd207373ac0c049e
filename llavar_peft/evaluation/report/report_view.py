"""The view of one data set in a report: its figures, bars by kind of text, changed answers, and examples."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from llavar_peft.evaluation.fields.score_fields import FIELDS, compare_fields
from llavar_peft.evaluation.vqa.answer_metrics import LOWER_IS_BETTER
from llavar_peft.evaluation.vqa.compare_results import Comparison, compare_results
from llavar_peft.evaluation.vqa.diagnose_results import Group, break_down, count_too_small
from llavar_peft.evaluation.vqa.protocol_lines import explain_protocol
from llavar_peft.evaluation.vqa.scored_results import Answered, Figure, Results
from llavar_peft.page.image_gallery import Asked, GalleryCard, ShownAnswer, displayed_answers, make_answer
from llavar_peft.page.inline_images import InlineImage, embed_image
from llavar_peft.page.report_page import Bar, Bars, Cards, DatasetView, FigureRow, ScoredCard

PAPER: Final[Mapping[str, Mapping[str, float]]] = {
    "stvqa": {"multimodalocr": 39.2, "meteor": 12.8, "rouge-l": 14.3, "cider": 30.9},
    "ocrvqa": {"multimodalocr": 23.8, "long-correct": 9.0, "long-partial": 26.8},
    "textvqa": {"multimodalocr": 48.5, "meteor": 14.8, "rouge-l": 17.4, "cider": 27.0},
    "docvqa": {"multimodalocr": 11.6, "meteor": 8.6, "rouge-l": 10.0, "cider": 21.5},
    "ct80": {"multimodalocr": 83.0},
    "poie": {"multimodalocr": 8.7},
    "chartqa": {"multimodalocr": 13.5},
    "scienceqa": {"scienceqa": 91.42},
}
"""LLaVAR's figures by data set and protocol. Source: arXiv 2306.17107, Table 2 and appendices D, E and I."""
_NAMED: Final = re.compile(
    r"(?<![a-z])(?:(st|ocr|text|doc)[-_ ]?(vqa)|(chart|science)[-_ ]?(qa)|(ct80|poie)(?![a-z]))", re.IGNORECASE
)
PAPER_MME: Final = {"mme score": 80.0}
"""Sum of accuracy and accuracy+ (of 200) of LLaVAR's released answers on MME's OCR images."""
_UNKNOWN_HEIGHT: Final = 1e9
_MAX_TEXT: Final = 280  # characters of a truth or an answer
_SETTINGS: Final = (
    "model", "model_hash", "prompt", "image_mode", "decoding", "temperature", "top_k", "max_new_tokens", "seed",
)  # fmt: skip


class Images:
    """Images for a page; each is opened once.

    Args:
        folders: Folders to search, in this order. A path cannot leave its folder.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = tuple(folders)
        self._known: dict[str, InlineImage | None] = {}

    def find(self, image: str) -> InlineImage | None:
        """Return an image ready to embed, or None if it is missing or broken."""
        if image not in self._known:
            embedded = (embed_image(folder, image) for folder in self.folders)
            self._known[image] = next((found for found in embedded if found is not None), None)
        return self._known[image]


@dataclass(frozen=True, slots=True)
class Labelled:
    """Results with the label of their column and the name of their file."""

    label: str
    name: str
    results: Results


def view_dataset(chain: Sequence[Labelled], protocol: str, images: Images, shown: int) -> DatasetView:
    """Build the view of one data set.

    Args:
        chain: Results on the same questions in order, e.g. of the previous run, after stage 1, after stage 2.
        protocol: The protocol that orders the examples and decides what changed.
        images: The images.
        shown: Number of examples in each row.

    Raises:
        DataError: The results contradict each other.
    """
    latest = chain[-1].results
    steps = list(pairwise(chain))
    comparisons = [compare_results(one.results, other.results, protocol) for one, other in steps]
    sections: list[Cards] = []
    if comparisons:
        sections += _changed_cards(chain, protocol, comparisons[-1], images, shown)
    sections += _extreme_cards(chain, protocol, images, shown)
    return DatasetView(
        name=Path(latest.dataset).stem,
        records=len(latest.records),
        settings=tuple((one.label, _facts(one.results)) for one in chain),
        rows=tuple(_rows(chain)),
        protocol=protocol,
        changed=" ".join(
            _describe_change(one.label, other.label, comparison)
            for (one, other), comparison in zip(steps, comparisons, strict=True)
        ),
        bars=tuple(_bars(break_down(latest, protocol))),
        too_small=_too_small(latest),
        sections=tuple(section for section in sections if section.cards),
    )


def bar_share(percent: float) -> float:
    """Return the length of a bar from 0 to 1; error rates may be above 100 %."""
    return min(max(percent / 100, 0.0), 1.0)


def _facts(results: Results) -> tuple[tuple[str, str], ...]:
    figure = results.figures[0].as_dict()
    facts = [(key.replace("_", " "), str(figure[key])) for key in _SETTINGS if figure[key] is not None]
    return (("data set", results.dataset), *facts)


def _rows(chain: Sequence[Labelled]) -> list[FigureRow]:
    by_result = [{figure.protocol: figure for figure in one.results.figures} for one in chain]
    paper = _paper(chain[-1].results)
    rows = []
    for protocol, figure in by_result[-1].items():
        cells = tuple(_cell(one.label, figures.get(protocol)) for one, figures in zip(chain, by_result, strict=True))
        rows.append(
            FigureRow(
                protocol,
                figure.lower_is_better,
                cells,
                _difference(chain, protocol),
                f"{paper[protocol]:.1f}" if protocol in paper else "",
                explain_protocol(protocol),
            )
        )
    return rows


def _cell(label: str, figure: Figure | None) -> tuple[str, str | None, str]:
    if figure is None:
        return label, None, ""
    return label, f"{figure.value:.1f}", f"{figure.low:.1f} to {figure.high:.1f}"


def _difference(chain: Sequence[Labelled], protocol: str) -> str:
    """Return the difference between the last two results; empty for figures that are not sums over records."""
    pair = [one.results for one in chain[-2:]]
    if len(pair) < 2 or any(protocol not in record.scores for results in pair for record in results.records[:1]):
        return ""
    whole = compare_results(pair[0], pair[1], protocol).whole
    return f"{whole.difference:+.1f} ({whole.low:+.1f} to {whole.high:+.1f}), p {whole.p_value:.2g}"


def _paper(results: Results) -> Mapping[str, float]:
    """Return the paper's figures, by the name of the data set: ``TextVQA_0.5.1_val``, ``LLaVAR_STVQA``."""
    named = _NAMED.search(Path(results.dataset).name)
    known = "".join(part for part in named.groups() if part).lower() if named else ""
    return {**PAPER.get(known, {}), **PAPER_MME}


def _describe_change(before: str, after: str, comparison: Comparison) -> str:
    whole = comparison.whole
    others = f"; {comparison.unpaired} more are in only one of them" if comparison.unpaired else ""
    return (
        f"From {before!r} to {after!r}: {whole.gained:,} of {whole.records:,} answers became better, {whole.lost:,} "
        f"became worse{others}."
    )


def _bars(groups: Sequence[Group]) -> list[Bars]:
    by: dict[str, list[Bar]] = {}
    for group in groups:
        bar = Bar(
            group.name,
            group.records,
            f"{group.value:.1f}",
            f"{group.low:.1f} to {group.high:.1f}",
            bar_share(group.value),
        )
        by.setdefault(group.by, []).append(bar)
    return [Bars(name.replace("_", " "), tuple(bars)) for name, bars in by.items()]


def _too_small(results: Results) -> str:
    small = count_too_small(results.records)
    if not small.known:
        return (
            "The height of the letters is unknown: the data set gives neither text_height nor box. "
            "Take it from an OCR pass with llavar-peft eval vqa --heights."
        )
    return (
        f"Too small to read (below {small.smallest:g} pixels of the tower's input): {small.records:,} of the "
        f"{small.known:,} records with a known letter height, {100 * small.records / small.known:.1f} %."
    )


def _extreme_cards(chain: Sequence[Labelled], protocol: str, images: Images, count: int) -> tuple[Cards, Cards]:
    """Choose the best and the worst answers of the last result, at most one per image.

    Among equal scores, the best ones start with the smallest letters, the worst ones with the largest.
    """
    records = chain[-1].results.records
    sign = 1 if protocol in LOWER_IS_BETTER else -1

    def height(record: Answered, unknown: float) -> float:
        return unknown if record.letter_height is None else record.letter_height

    def best(record: Answered) -> tuple[float, float]:
        return sign * record.scores[protocol].value, height(record, _UNKNOWN_HEIGHT)

    def worst(record: Answered) -> tuple[float, float]:
        return -sign * record.scores[protocol].value, -height(record, 0.0)

    def row(title: str, aside: str, chosen: Sequence[Answered]) -> Cards:
        return Cards(title, aside, len(records), tuple(_card(one, chain, protocol, images) for one in chosen))

    count = min(count, (len(records) + 1) // 2)  # so that few records are not all among the best
    first = _one_per_image(sorted(records, key=best), count)
    # No answer is among the best and among the worst.
    kept = {record.id for record in first}
    last = _one_per_image([one for one in sorted(records, key=worst) if one.id not in kept], count)
    return (
        row("Best", "Highest scores; among equal scores, the smallest letters first. One per image.", first),
        row("Worst", "Lowest scores; among equal scores, the largest letters first. One per image.", last),
    )


def _changed_cards(
    chain: Sequence[Labelled], protocol: str, comparison: Comparison, images: Images, count: int
) -> list[Cards]:
    """Return the answers that became better and those that became worse, evenly spread over the data set."""
    records = {record.id: record for record in chain[-1].results.records}
    rows = []
    for title, gained in (("Became better", True), ("Became worse", False)):
        changed = [records[change.id] for change in comparison.changes if change.gained == gained]
        chosen = _spread(changed, count)
        cards = tuple(_card(one, chain, protocol, images) for one in chosen)
        aside = f"From {chain[-2].label!r} to {chain[-1].label!r}; evenly spread over the data set, not selected."
        rows.append(Cards(title, aside, len(changed), cards, near=True))
    return rows


def _one_per_image(records: Iterable[Answered], count: int) -> list[Answered]:
    """Return the first record of each image, up to a number of records."""
    found: dict[tuple[str, bool], Answered] = {}
    for record in records:
        if len(found) == count:
            break
        found.setdefault(record.drawn_with, record)
    return list(found.values())


def _spread(records: Sequence[Answered], count: int) -> list[Answered]:
    count = min(count, len(records))
    return [records[number * len(records) // count] for number in range(count)]


def _shown(label: str, answer: str, truth: str, form: bool, correct: bool) -> ShownAnswer:
    if not form:
        return make_answer(label, displayed_answers(answer, _MAX_TEXT), truth, correct=correct)
    lines = [(displayed_answers(text, _MAX_TEXT) + "\n", wrong) for text, wrong in compare_fields(answer, truth)]
    return ShownAnswer(label, tuple(lines), correct)


def _card(record: Answered, chain: Sequence[Labelled], protocol: str, images: Images) -> ScoredCard:
    image = images.find(record.image) if record.image else None
    missing = "Image not found: give its folder with --images" if record.image else "This record has no image"
    truth = " | ".join(dict.fromkeys(record.truths))
    answers, scores = [], []
    for labelled in chain:
        other = next((one for one in labelled.results.records if one.id == record.id), None)
        if other is not None:
            correct = other.scores[protocol].value == (0 if protocol in LOWER_IS_BETTER else 1)
            answers.append(_shown(labelled.label, other.answer, record.truths[0], FIELDS in other.scores, correct))
            scores.append(f"{100 * other.scores[protocol].value:.0f}")
    asked = Asked(
        displayed_answers(record.id, 80),
        displayed_answers(record.question, _MAX_TEXT),
        displayed_answers(truth, _MAX_TEXT),
        tuple(answers),
        (),
    )
    height = "" if record.letter_height is None else f", letters {record.letter_height:.1f} px"
    return ScoredCard(GalleryCard(image, missing, (asked,)), f"{protocol} {' → '.join(scores)} %{height}")
