"""The values that a report shows, ready to draw, and the page made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llavar_peft.page.image_gallery import Gallery, GalleryCard, make_gallery
from llavar_peft.page.page_templates import MOST_BYTES, render, write_page
from llavar_peft.page.probe_moments import moments
from llavar_peft.page.run_log import RunLog
from llavar_peft.page.run_page import run_values

REPORT_NAME = "report.html"
_LOOKS_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Head:
    """One of the large figures; ``share`` from 0 to 1 is its bar's length."""

    label: str
    value: str
    share: float
    note: str


@dataclass(frozen=True, slots=True)
class FigureRow:
    """One protocol's figures; ``cells`` are (column, figure, interval), None where a result does not have it."""

    protocol: str
    lower_is_better: bool
    cells: tuple[tuple[str, str | None, str], ...]
    difference: str
    paper: str


@dataclass(frozen=True, slots=True)
class Bar:
    """The figure of some of the records; ``share`` from 0 to 1 is its bar's length."""

    name: str
    records: int
    value: str
    interval: str
    share: float


@dataclass(frozen=True, slots=True)
class Bars:
    """Figures of records that are told apart by one thing."""

    title: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class ScoredCard:
    """An image with one question, and a line of facts below it."""

    card: GalleryCard
    facts: str


@dataclass(frozen=True, slots=True)
class Cards:
    """A row of images; ``total`` is how many there are to choose from, ``near`` ties it to what stands above."""

    title: str
    aside: str
    total: int
    cards: tuple[ScoredCard, ...]
    near: bool = False


@dataclass(frozen=True, slots=True)
class DatasetView:
    """What was found on one data set."""

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
) -> Path:
    """Write a report that stays below ``MOST_BYTES``: with fewer images, where they are too large.

    Args:
        path: Where it goes.
        title: Its heading.
        heads: The large figures.
        datasets: Gives what was found, with at most so many images in each row of them.
        run: What the run wrote, if the report is of a run.
        images: How many of them at first.

    Returns:
        ``path``.

    Raises:
        EnvironmentFaultError: It cannot be written there.
    """
    looks = moments(run.stages) if run else ()
    looks_shown = _LOOKS_SHOWN
    while True:
        gallery = make_gallery(looks, looks_shown) if run else Gallery((), 0)
        page = render(
            "report.html.j2",
            title=title,
            heads=heads,
            datasets=datasets(images),
            run=None if run is None else run.folder.name,
            **(run_values(run, looks, gallery) if run else {}),
        )
        if len(page) <= MOST_BYTES or not (images or looks_shown):
            return write_page(path, page)
        images, looks_shown = images // 2, looks_shown // 2
