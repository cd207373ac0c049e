"""The page of accuracy against letter height, and the values that it and a report show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llavar_peft.page.charts import Chart
from llavar_peft.page.inline_images import InlineImage
from llavar_peft.page.page_templates import render, write_page


@dataclass(frozen=True, slots=True)
class ReadModel:
    """How small a model reads: the best accuracy, and the heights below which it falls under 90 % and half the best."""

    name: str
    questions: str
    best: str
    readable: str
    half: str


@dataclass(frozen=True, slots=True)
class HeightsView:
    """Accuracy against letter height on one data set.

    Attributes:
        name: Name of the data set.
        protocol: The protocol that scored the answers.
        chart: The curves.
        models: One row for each model.
        rows: Height, and for each model its name, the accuracy with its interval, and the number of questions.
        notes: What was asked and how, in whole sentences.
        settings: How the answers were generated, by model.
        seen: What a plain model sees of one image, with its height and the question, if images are at hand.
    """

    name: str
    protocol: str
    chart: Chart
    models: tuple[ReadModel, ...]
    rows: tuple[tuple[str, tuple[tuple[str, str, str], ...]], ...]
    notes: tuple[str, ...]
    settings: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    seen: tuple[tuple[str, InlineImage], ...] = ()


def write_heights_page(path: Path, views: Sequence[HeightsView]) -> Path:
    """Write a page of its own for figures by height; the same values give the same bytes.

    Raises:
        EnvironmentFaultError: The page cannot be written.
    """
    title = ", ".join(dict.fromkeys(view.name for view in views))
    return write_page(path, render("heights.html.j2", title=title, heights=views))
