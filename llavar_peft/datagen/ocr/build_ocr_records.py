"""Build records in the released format from a folder of images, with a report of what was dropped and why.

Source: arXiv 2306.17107, section 3 (422K noisy OCR records); its code was not released.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from random import Random
from statistics import median
from typing import Any, Literal, TypeAlias

from llavar_peft.atomic_files import check_output_file, write_json
from llavar_peft.compat.usable_cores import usable_cores
from llavar_peft.constants import IMAGE_PLACEHOLDER, OCR_INSTRUCTIONS
from llavar_peft.data.resume_journal import ResumeJournal
from llavar_peft.datagen.ocr.duplicate_images import Candidate, find_duplicates
from llavar_peft.datagen.ocr.list_images import MOST_PAGES_READ, list_folder
from llavar_peft.datagen.ocr.ocr_lines import OcrLine, letter_count
from llavar_peft.datagen.ocr.ocr_quality import QualityLimits, confident, judge_quality, script_counts
from llavar_peft.datagen.ocr.ocr_report import BuildReport, Drop
from llavar_peft.datagen.ocr.page_geometry import upright_boxes
from llavar_peft.datagen.ocr.read_image_folder import (
    OcrReader,
    ReadingSettings,
    file_stamp,
    read_images,
)
from llavar_peft.datagen.ocr.reading_agreement import choose_second_readings, compare_readings
from llavar_peft.datagen.ocr.stored_readings import stored_readings
from llavar_peft.errors import DAMAGED, DataError, ImageError
from llavar_peft.text_files import read_json

Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """How records are built from images.

    Attributes:
        reading: How images are read.
        limits: Minimum quality of the text.
        seed: Selects, with a record's id, its instruction and whether the image precedes it.
        keep_duplicates: Whether copies of an image become records too.
        workers: Number of processes that read; None for one per usable core.
        on_bad_image: Whether an image that cannot be opened is skipped or stops the build.
        pages: The pages of each PDF document, such as ``1-3,7``, if it has them; None for all.
        most_pages: Largest number of pages of each document.
    """

    reading: ReadingSettings = field(default_factory=ReadingSettings)
    limits: QualityLimits = field(default_factory=QualityLimits)
    seed: int = 0
    keep_duplicates: bool = False
    workers: int | None = None
    on_bad_image: Literal["skip", "stop"] = "skip"
    pages: str | None = None
    most_pages: int = MOST_PAGES_READ


def journal_path(out: Path) -> Path:
    """Return the path of the readings for a file of records."""
    return out.with_suffix(".ocr.jsonl")


def report_path(out: Path) -> Path:
    """Return the path of the report for a file of records."""
    return out.with_suffix(".report.json")


def read_folder(records: Path) -> Path:
    """Return the folder of images that a report names. Raises ``DataError`` if there is none."""
    path = report_path(records)
    fix = "give --images FOLDER"
    try:
        return Path(read_json(path, fix=fix)["folder"])
    except DAMAGED as error:
        raise DataError.at(str(path), "does not name the folder of the images", fix) from error


def build_records(
    images: Path, out: Path, settings: BuildSettings | None = None, progress: Progress | None = None
) -> BuildReport:
    """Build one record for each image of a folder, and each page of its PDF documents, whose text is good enough.

    Readings are kept next to the records: a killed run is resumed, and other limits need no new reading.

    Args:
        images: The folder; records contain the images' paths within it.
        out: The file of records to write, ``.json``.
        progress: Called with the number of images read and in total.

    Returns:
        The report, which is also written next to the records.

    Raises:
        ImageError: The folder does not exist, or an image is broken and ``on_bad_image`` is ``"stop"``.
        DataError: The existing readings have other settings, or no image became a record.
        MissingDependencyError: An engine is not installed.
        InterruptedRunError: Ctrl-C was pressed; run again to resume.
        EnvironmentFaultError: A process died, or a file cannot be written.
    """
    settings = settings or BuildSettings()
    started = time.monotonic()
    check_output_file(out, "--out")
    folder = list_folder(images, settings.pages, settings.most_pages)
    heading = OcrReader(images, settings.reading).heading()
    with ResumeJournal(journal_path(out), heading) as journal:
        # Failures of an engine are retried, because the machine may have caused them.
        retried = {"engine_failed", "broken_image"} if settings.on_bad_image == "stop" else {"engine_failed"}
        engines = settings.reading.engines
        known = _find_readings(journal, images, folder.images, engines)
        new = [path for path in folder.images if path not in known or known[path].reason in retried]
        report = BuildReport(
            str(images), str(out), heading, len(folder.images), len(folder.images) - len(new), folder.others
        )
        report.drops += [Drop(path, "broken_image", "its name is not Unicode") for path in folder.unnameable]
        report.drops += [Drop(path, "pages_left_out", what) for path, what in folder.cut]
        twice = frozenset[str]() if settings.reading.both else choose_second_readings(new, report.resumed)
        reading = replace(settings.reading, twice=twice)
        _read_new(images, new, replace(settings, reading=reading), journal, report, progress)
        readings = _current_entries(journal, _find_readings(journal, images, folder.images, engines))
        records = _make_records(readings, settings, report, _record_ids(folder.images))
        write_json(out, records)
        report.seconds = time.monotonic() - started
        write_json(report_path(out), report.as_dict())
    if not records:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.counts.items()) or "the folder has none"
        if broken := next((drop for drop in report.drops if drop.reason == "broken_image"), None):
            reasons += f"; {broken.detail.rstrip('.')}"
        if folder.some_others:
            reasons += f"; other files: {', '.join(folder.some_others)}"
        raise DataError.at(
            str(images),
            f"no image became a record ({reasons})",
            f"see {report_path(out)}; other formats have to be converted to PNG, JPEG or PDF first",
        )
    return report


@dataclass(frozen=True, slots=True)
class _Reading:
    """Offset of an image's reading in the journal, and the reason if reading failed."""

    offset: int
    reason: str | None


def _find_readings(
    journal: ResumeJournal, images: Path, paths: Sequence[str], engines: Sequence[str]
) -> dict[str, _Reading]:
    """Return the last reading of each image that has not changed since."""
    expected = {path: file_stamp(images / path) for path in paths}
    found: dict[str, _Reading] = {}
    for offset, entry in stored_readings(journal.path, engines):
        path = entry["path"]
        stamp = {key: entry[key] for key in ("size", "mtime_ns") if key in entry}
        if path in expected and stamp == expected[path]:
            found[path] = _Reading(offset, entry.get("reason"))
    return found


def _current_entries(journal: ResumeJournal, known: Mapping[str, _Reading]) -> Iterator[dict[str, Any]]:
    for offset, entry in stored_readings(journal.path):
        if entry["path"] in known and known[entry["path"]].offset == offset:
            yield entry


def _read_new(
    images: Path,
    paths: list[str],
    settings: BuildSettings,
    journal: ResumeJournal,
    report: BuildReport,
    progress: Progress | None,
) -> None:
    done = report.resumed

    def on_entry(entry: Mapping[str, Any]) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, report.images)
        if settings.on_bad_image == "stop" and entry.get("reason") == "broken_image":
            raise ImageError(entry["error"])

    read_images(images, paths, settings.reading, journal, settings.workers or usable_cores(), on_entry)


def _make_records(
    readings: Iterator[dict[str, Any]], settings: BuildSettings, report: BuildReport, ids: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Filter readings, drop copies, and return records in the order of the images' paths.

    In addition to the format's fields, a record has the sizes of its image and its letters for ``eval diagnose``, and
    the profile with which the image was read.
    """
    good: dict[str, Candidate] = {}
    sizes: dict[str, dict[str, Any]] = {}
    for entry in readings:
        candidate = _make_candidate(entry, settings, report)
        if candidate is not None:
            good[candidate.path] = candidate
            sizes[candidate.path] = _measure_sizes(entry, settings)
            compare_readings(report.agreement, candidate.path, candidate.text, entry, settings.limits)
    copies = {} if settings.keep_duplicates else find_duplicates(list(good.values()))
    for path, original in copies.items():
        del good[path]
        report.drops.append(Drop(path, "duplicate", f"of {original}"))
    report.drops.sort(key=lambda drop: drop.path)
    records = []
    for path in sorted(good):
        text = good[path].text
        records.append(make_ocr_record(ids[path], path, text, settings.seed) | sizes[path])
        report.letters += letter_count(text)
        report.scripts += script_counts(text)
    report.kept = len(records)
    return records


def _make_candidate(entry: Mapping[str, Any], settings: BuildSettings, report: BuildReport) -> Candidate | None:
    path = entry["path"]
    if "error" in entry:
        report.drops.append(Drop(path, entry["reason"], entry["error"]))
        return None
    if "page" in entry:
        report.pages[entry["page"]] += 1
    readings = [[OcrLine.from_json(line) for line in entry["lines"][name]] for name in settings.reading.engines]
    if profile := entry.get("profile"):
        report.profiles[profile] += 1
    verdict = judge_quality(readings[0], settings.limits, readings[1] if settings.reading.both else None)
    report.lines += verdict.lines
    report.lines_left_out += verdict.left_out
    if verdict.reason is not None:
        reason = "blank_page" if verdict.reason == "no_text" and entry["blank"] else verdict.reason
        report.drops.append(Drop(path, reason, verdict.detail))
        return None
    return Candidate(path, entry["width"] * entry["height"], int(entry["hash"], 16), verdict.text)


def _measure_sizes(entry: Mapping[str, Any], settings: BuildSettings) -> dict[str, Any]:
    """Return the image's size and the median height of its lines, in pixels, and its profile if it was chosen."""
    lines = confident(map(OcrLine.from_json, entry["lines"][settings.reading.engine]), settings.limits)
    height = median(box.height for box in upright_boxes(lines))
    sizes = {"image_width": entry["width"], "image_height": entry["height"], "text_height": round(height, 1)}
    return sizes | {key: entry[key] for key in ("profile",) if key in entry}


def _record_ids(paths: Sequence[str]) -> dict[str, str]:
    """Return ids as in the released data: paths without extension, or with it if two would be equal."""
    stems = {path: str(PurePosixPath(path).with_suffix("")) for path in paths}
    used = Counter(stems.values())
    return {path: stem if used[stem] == 1 else path for path, stem in stems.items()}


def make_ocr_record(record_id: str, image: str, text: str, seed: int) -> dict[str, Any]:
    """Return a record in the released format, with an image's text as the answer to one of the ten instructions.

    Args:
        record_id: Id of the record.
        image: Path of the image.
        text: The answer.
        seed: Selects, with the id, the instruction and whether the image precedes it.
    """
    rng = Random(f"{seed}/{record_id}")
    instruction = rng.choice(OCR_INSTRUCTIONS)
    question = rng.choice((f"{IMAGE_PLACEHOLDER}\n{instruction}", f"{instruction}\n{IMAGE_PLACEHOLDER}"))
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": text}]
    return {"id": record_id, "image": image, "conversations": turns}
