"""Select records of ``ocr build`` by how much text their images hold, and by what kind of image they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llavar_peft.atomic_files import check_output_file, write_json
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.datagen.ocr.build_ocr_records import Progress, journal_path, read_folder
from llavar_peft.datagen.ocr.image_categories import ImageCategories
from llavar_peft.datagen.ocr.ocr_lines import OcrLine
from llavar_peft.datagen.ocr.ocr_quality import QualityLimits, confident
from llavar_peft.datagen.ocr.stored_readings import stored_readings
from llavar_peft.errors import DataError, ImageError
from llavar_peft.text_files import read_json


@dataclass(frozen=True, kw_only=True)
class SelectSettings:
    """Which records are kept.

    Attributes:
        min_lines: Minimum number of confident lines.
        min_share: Minimum share of the image that these lines cover.
        clip: A folder of a CLIP that names the category of each image.
        categories: The categories between which it decides.
        keep: The categories that are kept; empty for all.
        images: The folder of the images; None for the one that ``ocr build`` has read.
    """

    min_lines: int = 1
    min_share: float = 0.0
    clip: Path | None = None
    categories: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    images: Path | None = None


@dataclass
class SelectReport:
    """Number of records, of those kept, and of those left out by reason; images by category."""

    records: int
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)


def select_records(
    records: Path, out: Path, settings: SelectSettings, progress: Progress | None = None
) -> SelectReport:
    """Write the records that are kept, each with its ``text_lines`` and ``text_share``, and its ``category``.

    Args:
        records: The file of records of ``ocr build``, with the readings next to it.
        out: The file of records to write, ``.json``.
        progress: Called with the number of records done and in total.

    Raises:
        DataError: The records or the readings are missing, or no record is kept.
        ConfigError: The CLIP cannot be loaded.
    """
    check_output_file(out, "--out")
    rows = _read_rows(records)
    richness = _read_richness(journal_path(records))
    chosen = ImageCategories(settings.clip, settings.categories) if settings.clip else None
    roots = ImageRoots(settings.images or read_folder(records)) if chosen else None
    report, kept = SelectReport(len(rows)), list[dict[str, Any]]()
    for number, row in enumerate(rows, 1):
        lines, share = richness.get(row["image"], (0, 0.0))
        new = {**row, "text_lines": lines, "text_share": round(share, 4)}
        reason = "little text" if lines < settings.min_lines or share < settings.min_share else None
        if reason is None and chosen is not None and roots is not None:
            try:
                new["category"], similarity = chosen.choose(roots.open(row["image"]))
                new["similarity"] = round(similarity, 4)
                report.categories[new["category"]] += 1
                reason = "another category" if settings.keep and new["category"] not in settings.keep else None
            except ImageError:
                reason = "broken image"
        if reason is None:
            kept.append(new)
        else:
            report.dropped[reason] += 1
        if progress is not None:
            progress(number, len(rows))
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items()) or "the file has none"
        raise DataError.at(str(records), f"no record is kept ({reasons})", "lower --min-lines or --min-share")
    report.kept = len(kept)
    write_json(out, kept)
    return report


def _read_rows(records: Path) -> list[dict[str, Any]]:
    fix = "give the records that 'llavar-peft ocr build' wrote"
    rows = read_json(records, fix=fix)
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and isinstance(row.get("image"), str) for row in rows
    ):
        raise DataError.at(str(records), "is no list of records with one image each", fix)
    return rows


def _read_richness(readings: Path) -> Mapping[str, tuple[int, float]]:
    """Return the number of confident lines of each image, and the share of the image that they cover."""
    if not readings.is_file():
        raise DataError.at(str(readings), "is missing", "give records with the readings of 'ocr build' next to them")
    richness: dict[str, tuple[int, float]] = {}
    for _, entry in stored_readings(readings):
        found: list[Any] = next(iter((entry.get("lines") or {}).values()), [])
        lines = confident(map(OcrLine.from_json, found), QualityLimits())
        area = sum(_area(line) for line in lines)
        pixels = entry.get("width", 0) * entry.get("height", 0)
        richness[entry["path"]] = (len(lines), min(1.0, area / pixels) if pixels else 0.0)
    return richness


def _area(line: OcrLine) -> float:
    x_4, y_4 = np.array(line.polygon).T
    return float(abs(np.dot(x_4, np.roll(y_4, 1)) - np.dot(y_4, np.roll(x_4, 1))) / 2)
