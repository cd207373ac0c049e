"""The page of ``ocr build``: some of the records, and some of the images that were left out, with the reason."""

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
"""Maximum number of images shown for each reason."""
_LONGEST_TEXT = 600


@dataclass(frozen=True, slots=True)
class OcrCard:
    """An image with its question and text, or with the reason why it was left out."""

    path: str
    image: InlineImage | None
    question: str
    text: str


def write_ocr_page(records: Path) -> Path:
    """Write the page of a build next to its records; the same files give the same bytes.

    Args:
        records: The file of records, with its ``.report.json`` next to it.

    Returns:
        The page, ``.report.html``.
    """
    report = json.loads(records.with_suffix(".report.json").read_text("utf-8"))
    rows = json.loads(records.read_text("utf-8"))
    folder = Path(report["folder"])
    dropped = sorted(report["drops"], key=lambda drop: (drop["reason"], drop["path"]))
    page = render(
        "ocr.html.j2",
        title=report["records"],
        report=report,
        warned=[_uncertain(folder, one) for one in report["agreement"]["examples"]] if report["uncertain"] else [],
        kept=[_kept(folder, row) for row in _spread(rows, MOST_KEPT)],
        dropped=[
            (reason, report["dropped"][reason], [_dropped(folder, drop) for drop in _spread(list(group), MOST_DROPPED)])
            for reason, group in groupby(dropped, key=lambda drop: drop["reason"])
        ],
    )
    return write_page(records.with_suffix(".report.html"), page)


def _spread(rows: list[Any], most: int) -> list[Any]:
    """Return at most ``most`` rows, evenly spaced."""
    return [rows[number * len(rows) // most] for number in range(most)] if len(rows) > most else rows


def _kept(folder: Path, record: dict[str, Any]) -> OcrCard:
    question, answer = (turn["value"] for turn in record["conversations"])
    text = answer[:_LONGEST_TEXT] + " …" if len(answer) > _LONGEST_TEXT else answer
    return OcrCard(record["image"], embed_image(folder, record["image"]), question, text)


def _dropped(folder: Path, drop: dict[str, str]) -> OcrCard:
    return OcrCard(drop["path"], embed_image(folder, drop["path"]), "", drop["detail"])


def _uncertain(folder: Path, example: dict[str, str]) -> OcrCard:
    return OcrCard(
        example["path"], embed_image(folder, example["path"]), "", f"{example['first']} / {example['second']}"
    )
