"""The page of a report, and the values that it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llavar_peft.page.findings import Finding
from llavar_peft.page.heights_page import HeightsView
from llavar_peft.page.image_gallery import Gallery, GalleryCard, make_gallery
from llavar_peft.page.named_probes import named_probes
from llavar_peft.page.page_templates import MOST_BYTES, render, write_page
from llavar_peft.page.run_log import RunLog
from llavar_peft.page.run_page import run_values

REPORT_NAME = "report.html"
_SAMPLES_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Head:
    """A large figure; ``share``, from 0 to 1, is the length of its bar."""

    label: str
    value: str
    share: float
    note: str


@dataclass(frozen=True, slots=True)
class FigureRow:
    """The figures of one protocol; ``cells`` are (column, figure or None, interval), ``line`` says what it counts."""

    protocol: str
    lower_is_better: bool
    cells: tuple[tuple[str, str | None, str], ...]
    difference: str
    paper: str
    line: str


@dataclass(frozen=True, slots=True)
class Bar:
    """The figure of a group of records; ``share``, from 0 to 1, is the length of its bar."""

    name: str
    records: int
    value: str
    interval: str
    share: float


@dataclass(frozen=True, slots=True)
class Bars:
    """Figures of records grouped by one property."""

    title: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class ScoredCard:
    """An image with one question, and a line of facts below it."""

    card: GalleryCard
    facts: str


@dataclass(frozen=True, slots=True)
class Cards:
    """A row of images out of ``total``; ``near`` places it close to the section above."""

    title: str
    aside: str
    total: int
    cards: tuple[ScoredCard, ...]
    near: bool = False


@dataclass(frozen=True, slots=True)
class DatasetView:
    """The results on one data set."""

    name: str
    records: int
    settings: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    rows: tuple[FigureRow, ...]
    protocol: str
    changed: str
    bars: tuple[Bars, ...]
    too_small: str
    sections: tuple[Cards, ...]


def write_report_page(
    path: Path,
    title: str,
    heads: Sequence[Head],
    datasets: Callable[[int], Sequence[DatasetView]],
    run: RunLog | None,
    images: int,
    heights: Sequence[HeightsView] = (),
    findings: Sequence[Finding] = (),
) -> Path:
    """Write a report of at most ``MOST_BYTES``, with fewer images if necessary, and return its path.

    Args:
        path: Path of the page.
        title: Heading of the page.
        heads: The large figures.
        datasets: Returns the results with a given maximum number of images in each row.
        run: The files of the run, if the report is about one.
        images: Maximum number of images in each row.
        heights: Figures by letter height.
        findings: What the figures say about the next step.

    Raises:
        EnvironmentFaultError: The page cannot be written.
    """
    probes = named_probes(run.stages) if run else ()
    samples = _SAMPLES_SHOWN
    while True:
        gallery = make_gallery(probes, samples) if run else Gallery((), 0)
        page = render(
            "report.html.j2",
            title=title,
            heads=heads,
            datasets=datasets(images),
            heights=heights,
            run=None if run is None else run.folder.name,
            **{**(run_values(run, probes, gallery) if run else {}), "findings": findings},
        )
        if len(page) <= MOST_BYTES or not (images or samples):
            return write_page(path, page)
        images, samples = images // 2, samples // 2
