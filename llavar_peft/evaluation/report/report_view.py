"""Results as a report shows them: tables, bars by kind of text, and what changed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from llavar_peft.evaluation.report.report_cards import Images, changed_cards, extreme_cards
from llavar_peft.evaluation.vqa.compare_results import Comparison, compare_results
from llavar_peft.evaluation.vqa.diagnose_results import Group, break_down, count_too_small
from llavar_peft.evaluation.vqa.scored_results import Figure, Results
from llavar_peft.page.report_page import Bar, Bars, Cards, DatasetView, FigureRow

PAPER: Final[Mapping[str, Mapping[str, float]]] = {
    "st": {"multimodalocr": 39.2},
    "ocr": {"multimodalocr": 23.8},
    "text": {"multimodalocr": 48.5},
    "doc": {"multimodalocr": 11.6},
}
"""LLaVAR's figures by data set, as it is called before ``VQA``, and protocol. Source: arXiv 2306.17107, Table 2."""
_VQA: Final = re.compile(rf"(?<![a-z])({'|'.join(PAPER)})[-_ ]?VQA", re.IGNORECASE)
PAPER_MME: Final = {"mme score": 80.0}
"""Accuracy and accuracy+, of 200, which LLaVAR's released answers come to on MME's OCR images."""
_SETTINGS: Final = (
    "model", "model_hash", "prompt", "image_mode", "decoding", "temperature", "top_k", "max_new_tokens", "seed",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Labelled:
    """Results with what to call them in a column, and their file's name."""

    label: str
    name: str
    results: Results


def view_dataset(chain: Sequence[Labelled], protocol: str, images: Images, shown: int) -> DatasetView:
    """Say what was found on one data set.

    Args:
        chain: Results on the same questions, in order: before, after stage 1, after stage 2.
        protocol: Which tells best from worst, and what changed.
        images: Where images are.
        shown: How many of them in each row.

    Returns:
        The tables and images.

    Raises:
        DataError: The results contradict each other.
    """
    latest = chain[-1].results
    steps = list(pairwise(chain))
    comparisons = [compare_results(one.results, other.results, protocol) for one, other in steps]
    sections: list[Cards] = []
    answers = [(one.label, one.results) for one in chain]
    if comparisons:
        sections += changed_cards(answers, protocol, comparisons[-1], images, shown)
    sections += extreme_cards(answers, protocol, images, shown)
    return DatasetView(
        name=Path(latest.dataset).stem,
        records=len(latest.records),
        settings=tuple((one.label, _facts(one.results)) for one in chain),
        rows=tuple(_rows(chain)),
        protocol=protocol,
        changed=" ".join(
            _told(one.label, other.label, comparison)
            for (one, other), comparison in zip(steps, comparisons, strict=True)
        ),
        bars=tuple(_bars(break_down(latest, protocol))),
        too_small=_too_small(latest),
        sections=tuple(section for section in sections if section.cards),
    )


def bar_share(percent: float) -> float:
    """How long a bar is, 0 to 1: error rates may be above 100 %."""
    return min(max(percent / 100, 0.0), 1.0)


def _facts(results: Results) -> tuple[tuple[str, str], ...]:
    said = results.figures[0].as_dict()
    facts = [(key.replace("_", " "), str(said[key])) for key in _SETTINGS if said[key] is not None]
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
            )
        )
    return rows


def _cell(label: str, figure: Figure | None) -> tuple[str, str | None, str]:
    if figure is None:
        return label, None, ""
    return label, f"{figure.value:.1f}", f"{figure.low:.1f} to {figure.high:.1f}"


def _difference(chain: Sequence[Labelled], protocol: str) -> str:
    """The last result's to the one before it; of figures that are no sums over records there is none."""
    pair = [one.results for one in chain[-2:]]
    if len(pair) < 2 or any(protocol not in record.scores for results in pair for record in results.records[:1]):
        return ""
    whole = compare_results(pair[0], pair[1], protocol).whole
    return f"{whole.difference:+.1f} ({whole.low:+.1f} to {whole.high:+.1f}), p {whole.p_value:.2g}"


def _paper(results: Results) -> Mapping[str, float]:
    """The paper's figures on the data set, as it or its file is called: ``TextVQA_0.5.1_val``, ``LLaVAR_STVQA``."""
    named = _VQA.search(Path(results.dataset).name)
    return {**(PAPER[named[1].lower()] if named else {}), **PAPER_MME}


def _told(before: str, after: str, comparison: Comparison) -> str:
    whole = comparison.whole
    others = f"; {comparison.unpaired} more are in one of them only" if comparison.unpaired else ""
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
            "The letters’ height is not known: the data set gives neither text_height nor box. "
            "It can be taken from an OCR pass: llavar-peft eval vqa --heights."
        )
    return (
        f"Too small to be read, below {small.smallest:g} pixels of the tower: {small.records:,} of the {small.known:,} "
        f"records whose letters’ height is known, {100 * small.records / small.known:.1f} %."
    )
