"""Find where the answers of questions stand in their images, by OCR: lines of text with their boxes.

The height of an answer's letters is then that of the ink in its lines' boxes, because engines leave more or less room
around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

from llavar_peft.compat.usable_cores import usable_cores
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.resume_journal import ResumeJournal
from llavar_peft.datagen.ocr.build_ocr_records import journal_path
from llavar_peft.datagen.ocr.ink_height import ink_height
from llavar_peft.datagen.ocr.ocr_lines import EngineName, OcrLine
from llavar_peft.datagen.ocr.page_geometry import Box, reading_order, upright_boxes
from llavar_peft.datagen.ocr.read_image_folder import OcrReader, ReadingSettings, file_stamp, read_images
from llavar_peft.datagen.ocr.stored_readings import stored_readings
from llavar_peft.errors import DataError
from llavar_peft.evaluation.vqa.answer_metrics import contains_words, normalize_answer
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion

_MOST_LINES: Final = 6
"""Number of lines over which an answer may be wrapped."""
_FEWEST: Final = 2
"""Letters and digits of an answer that is searched for: a single one stands in too many places."""
_YES_OR_NO: Final = frozenset({"yes", "no"})


@dataclass(frozen=True, slots=True)
class ImageText:
    """The text of an image.

    Attributes:
        size: (width, height) of the image in pixels.
        lines: Its lines in reading order.
        boxes: A box as high as the letters of each line.
    """

    size: tuple[int, int]
    lines: tuple[OcrLine, ...]
    boxes: tuple[Box, ...]


def find_answers(
    questions: Sequence[VqaQuestion], texts: Mapping[str, ImageText | None], roots: ImageRoots
) -> tuple[list[VqaQuestion], dict[str, int]]:
    """Complete questions by the place of their answer.

    Args:
        questions: Those whose record gives a height or a box are returned as they are.
        texts: The text of each image by its path; None for an image that the engine could not read.
        roots: The folders that contain the images.

    Returns:
        The questions whose answer was found, with its box, the height of its letters and the size of the image; and
        the number of the others by reason, as in ``REASONS``.
    """
    found: list[VqaQuestion] = []
    left_out: dict[str, int] = {}
    for question in questions:
        placed = _find(question, texts, roots)
        if isinstance(placed, str):
            left_out[placed] = left_out.get(placed, 0) + 1
        else:
            found.append(placed)
    return found, left_out


def needs_reading(question: VqaQuestion) -> bool:
    """Return whether OCR is needed to find an answer: its record does not say, and it may stand in the image."""
    known = question.text_height is not None or question.box is not None
    return not known and question.image is not None and not _is_yes_or_no(question)


def _is_yes_or_no(question: VqaQuestion) -> bool:
    return {normalize_answer(truth) for truth in question.truths} <= _YES_OR_NO


def _find(question: VqaQuestion, texts: Mapping[str, ImageText | None], roots: ImageRoots) -> VqaQuestion | str:
    if question.image is None:
        return "no_image"
    if question.text_height is not None or question.box is not None:
        return question
    if _is_yes_or_no(question):
        return "yes_or_no"
    text = texts.get(question.image)
    if text is None:
        return "unreadable" if question.image in texts else "not_found"
    truths = {normalize_answer(truth) for truth in question.truths}
    runs = [
        run
        for truth in truths
        if sum(letter.isalnum() for letter in truth) >= _FEWEST
        for run in _runs(text.lines, truth)
    ]
    if not runs:
        return "not_found"
    # The largest print, because the model may read the answer there.
    run = max(runs, key=lambda run: (median(text.boxes[number].height for number in run), -len(run)))
    lines = [text.lines[number] for number in run]
    xs, ys = zip(*(point for line in lines for point in line.polygon), strict=True)
    image = roots.open(question.image)
    height = median(ink_height(image, line) for line in lines)
    return replace(question, text_height=height, box=(min(xs), min(ys), max(xs), max(ys)), size=text.size)


def _runs(lines: Sequence[OcrLine], truth: str) -> list[range]:
    """Return the shortest runs of lines that contain normalized words."""
    runs = []
    for start in range(len(lines)):
        for end in range(start + 1, min(len(lines), start + _MOST_LINES) + 1):
            if _contains(lines[start:end], truth):
                if end == start + 1 or not _contains(lines[start + 1 : end], truth):
                    runs.append(range(start, end))
                break
    return runs


def _contains(lines: Sequence[OcrLine], truth: str) -> bool:
    return contains_words(normalize_answer(" ".join(line.text for line in lines)), truth)


def read_stored_texts(path: Path, images: Sequence[str]) -> dict[str, ImageText | None]:
    """Read the texts of images from the readings of ``ocr build``.

    Args:
        path: Records of ``ocr build``, or the file of readings next to them.
        images: The images' paths.

    Raises:
        DataError: There are no readings, they are damaged, or they are all of other images.
    """
    readings = path if path.suffix == ".jsonl" else journal_path(path)
    fix = "run 'ocr build' on the folder given as --images, and give its records"
    if not readings.is_file():
        raise DataError.at(str(path), f"there are no readings of OCR (no file {readings})", fix)
    expected = set(images)
    texts = {entry["path"]: _make_text(entry) for _, entry in stored_readings(readings) if entry["path"] in expected}
    if not texts:
        raise DataError.at(str(readings), "holds none of the images of the questions", fix)
    return texts


def read_texts(
    images: Sequence[str],
    roots: ImageRoots,
    journal: Path,
    engine: EngineName,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, ImageText | None]:
    """Read the texts of images by OCR, in their full size.

    Args:
        images: The images' paths.
        roots: The folders that contain them.
        journal: File that keeps the readings, for another run.
        engine: The OCR engine.
        workers: Number of processes; None for one per usable core.
        progress: Called with the number of images done and in total.

    Raises:
        MissingDependencyError: The engine is not installed.
        InterruptedRunError: Ctrl-C was pressed; the readings are kept.
        JournalSettingsError: The journal has readings of another engine.
    """
    settings = ReadingSettings(engine=engine, short_edge=0)
    texts: dict[str, ImageText | None] = {}
    folders = {image: _folder_of(image, roots) for image in images}
    heading = OcrReader(roots.roots[0], settings).heading()
    with ResumeJournal(journal, heading) as kept:
        for _, entry in stored_readings(journal, [engine]):
            image = entry["path"]
            stamp = file_stamp(folders[image] / image) if image in folders else None
            if stamp is not None and all(entry.get(key) == value for key, value in stamp.items()):
                texts[image] = _make_text(entry)

        def note(entry: Mapping[str, Any]) -> None:
            texts[entry["path"]] = _make_text(entry)
            if progress is not None:
                progress(len(texts), len(images))

        for folder in dict.fromkeys(folders.values()):
            new = [image for image in images if image not in texts and folders[image] == folder]
            read_images(folder, new, settings, kept, workers or usable_cores(), note)
    return texts


def _folder_of(image: str, roots: ImageRoots) -> Path:
    found = roots.resolve(image)
    return next(root for root in roots.roots if root / image == found)


def _make_text(entry: Mapping[str, Any]) -> ImageText | None:
    """Return the text of a reading by its first engine."""
    if "error" in entry:
        return None
    lines = [OcrLine.from_json(line) for line in next(iter(entry["lines"].values()))]
    boxes = upright_boxes(lines)
    order = reading_order(boxes) if lines else []
    size = (int(entry["width"]), int(entry["height"]))
    return ImageText(size, tuple(lines[number] for number in order), tuple(boxes[number] for number in order))
