"""The page of a build: what became records, and a few of those that did not, with the reason."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from llavar_peft.page.inline_images import InlineImage, embed_image
from llavar_peft.page.page_templates import render, write_page

MOST_KEPT = 24
MOST_DROPPED = 4
"""Of each reason."""
_LONGEST_TEXT = 600


@dataclass(frozen=True, slots=True)
class OcrCard:
    """One image with what it says, or why it is left out."""

    path: str
    image: InlineImage | None
    question: str
    text: str


def write_ocr_page(records: Path) -> Path:
    """Write the page of a build beside its records; the same files give the same bytes.

    Args:
        records: The records' file, with ``.report.json`` beside it.

    Returns:
        The page, ``.report.html``.
    """
    report = json.loads(records.with_suffix(".report.json").read_text("utf-8"))
    rows = json.loads(records.read_text("utf-8"))
    folder = Path(report["folder"])
    dropped = sorted(report["drops"], key=lambda drop: (drop["reason"], drop["path"]))
    page = render(
        "ocr.html.j2",
        report=report,
        kept=[_kept(folder, row) for row in _spread(rows, MOST_KEPT)],
        dropped=[
            (reason, report["dropped"][reason], [_dropped(folder, drop) for drop in _spread(list(group), MOST_DROPPED)])
            for reason, group in groupby(dropped, key=lambda drop: drop["reason"])
        ],
    )
    return write_page(records.with_suffix(".report.html"), page)


def _spread(rows: list[Any], most: int) -> list[Any]:
    """Some of the rows, evenly spread, none picked."""
    return [rows[number * len(rows) // most] for number in range(most)] if len(rows) > most else rows


def _kept(folder: Path, record: dict[str, Any]) -> OcrCard:
    asked, answered = (turn["value"] for turn in record["conversations"])
    cut = answered[:_LONGEST_TEXT] + " …" if len(answered) > _LONGEST_TEXT else answered
    return OcrCard(record["image"], embed_image(folder, record["image"]), asked, cut)


def _dropped(folder: Path, drop: dict[str, str]) -> OcrCard:
    return OcrCard(drop["path"], embed_image(folder, drop["path"]), "", drop["detail"])
