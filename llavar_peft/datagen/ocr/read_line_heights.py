"""The heights of the lines of text in images, from stored readings or from an engine.

The height of a line is that of its box in the upright page. An engine's boxes leave some room around the letters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.record_texts import ImageLines, ReadsLines, Size
from llavar_peft.datagen.ocr.build_ocr_records import journal_path
from llavar_peft.datagen.ocr.ocr_engines import open_ocr_engine
from llavar_peft.datagen.ocr.ocr_lines import OcrEngine, OcrError, OcrLine, letter_count
from llavar_peft.datagen.ocr.ocr_quality import QualityLimits, confident
from llavar_peft.datagen.ocr.page_geometry import upright_boxes
from llavar_peft.datagen.ocr.read_image_folder import bring_short_edge
from llavar_peft.datagen.ocr.stored_readings import stored_readings
from llavar_peft.errors import DataError, ImageError, MissingDependencyError
from llavar_peft.types import ImageSource

_LEAST_EDGE = 384
"""Length in pixels of the shorter side to which a smaller image is enlarged before it is read. A larger one keeps its
size, because small print would not survive."""
_LARGEST = 1e9  # pixels, in a file that anyone may have edited


def open_stored_lines(path: Path) -> ReadsLines:
    """Return a reader of the lines that ``ocr build`` has stored.

    Args:
        path: Its records, with the readings next to them, or the file of readings.

    Raises:
        DataError: There are no readings, or they are damaged.
    """
    readings = path if path.suffix == ".jsonl" else journal_path(path)
    if not readings.is_file():
        what = f"there are no readings of OCR for it (no file {readings})"
        raise DataError.at(str(path), what, "give the records that 'llavar-peft ocr build' wrote for the images")
    offsets = {entry["path"]: offset for offset, entry in stored_readings(readings) if "error" not in entry}

    def read(image: ImageSource, _roots: ImageRoots) -> ImageLines | None:
        if not isinstance(image, str) or image not in offsets:
            return None
        with readings.open("rb") as file:
            file.seek(offsets[image])
            entry: dict[str, Any] = json.loads(file.readline())
        size = entry.get("width", 0), entry.get("height", 0)
        stored: list[Any] = next(iter(entry["lines"].values()), [])
        return _measure(size, map(OcrLine.from_json, stored)) if all(0 < side < _LARGEST for side in size) else None

    return read


def open_line_reader() -> ReadsLines:
    """Return a reader that runs the first engine that is installed, RapidOCR or Tesseract.

    Raises:
        MissingDependencyError: None is installed.
    """
    engine = _first_engine()

    def read(image: ImageSource, roots: ImageRoots) -> ImageLines | None:
        try:
            opened = roots.open(image)
            scaled, scale = bring_short_edge(opened, max(_LEAST_EDGE, min(opened.size)))
            return _measure(opened.size, engine.read(scaled), scale)
        except (ImageError, OcrError):
            return None

    return read


def _first_engine() -> OcrEngine:
    try:
        return open_ocr_engine("rapidocr")
    except MissingDependencyError as error:
        try:
            return open_ocr_engine("tesseract")
        except MissingDependencyError:
            raise error from None


def _measure(size: Size, lines: Iterable[OcrLine], scale: float = 1.0) -> ImageLines:
    """Return the confident lines of an image that was scaled before it was read."""
    good = confident(lines, QualityLimits())
    boxes = upright_boxes(good) if good else []
    found = [
        (box.height / scale, letter_count(line.text))
        for box, line in zip(boxes, good, strict=True)
        if 0 < box.height < _LARGEST and letter_count(line.text)
    ]
    return ImageLines(size, tuple(found))
