"""From a folder of images to records in the released format, with an account of what was left out and why.

Source: arXiv 2306.17107, section 3 (422K noisy OCR records); which no one has released the code of.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from random import Random
from statistics import median
from typing import Any, Literal, TypeAlias

from llavar_peft.atomic_files import write_json
from llavar_peft.constants import IMAGE_PLACEHOLDER, OCR_INSTRUCTIONS
from llavar_peft.data.resume_journal import ResumeJournal
from llavar_peft.datagen.ocr.build_report import BuildReport, Drop
from llavar_peft.datagen.ocr.duplicate_images import Candidate, find_duplicates
from llavar_peft.datagen.ocr.ocr_lines import OcrLine, letter_count
from llavar_peft.datagen.ocr.quality_filter import QualityLimits, confident, judge_quality, script_counts
from llavar_peft.datagen.ocr.read_folder import (
    OcrReader,
    ReadingSettings,
    file_stamp,
    list_folder,
    read_images,
)
from llavar_peft.datagen.ocr.upright_boxes import upright_boxes
from llavar_peft.errors import DataError, ImageError

Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """How records are made of images.

    Attributes:
        reading: How images are read.
        limits: What is good enough.
        seed: Draws the instruction and the place of the image, for each record by its id alone.
        keep_duplicates: Whether copies of an image become records too.
        workers: Processes that read; None is one for each CPU that this process may use.
        on_bad_image: Whether an image that cannot be opened is left out, or ends the work.
    """

    reading: ReadingSettings = field(default_factory=ReadingSettings)
    limits: QualityLimits = field(default_factory=QualityLimits)
    seed: int = 0
    keep_duplicates: bool = False
    workers: int | None = None
    on_bad_image: Literal["skip", "stop"] = "skip"


def journal_path(out: Path) -> Path:
    """Where the readings behind a file of records are."""
    return out.with_suffix(".ocr.jsonl")


def report_path(out: Path) -> Path:
    """Where the account of a file of records is."""
    return out.with_suffix(".report.json")


def build_records(
    images: Path, out: Path, settings: BuildSettings | None = None, progress: Progress | None = None
) -> BuildReport:
    """Make one record for each image of a folder whose text is good enough.

    Readings are kept beside the records, so that a killed run goes on, and so that other limits cost no reading.

    Args:
        images: The folder; records name images by their paths within it.
        out: The records' file, ``.json``.
        settings: How; None for the defaults.
        progress: Called with (images read, images in all).

    Returns:
        What was kept and what was left out; the same is written beside the records.

    Raises:
        ImageError: There is no such folder, or an image is broken and ``on_bad_image`` is ``"stop"``.
        DataError: The readings there were made with other settings, or no image became a record.
        MissingDependencyError: An engine is not installed.
        InterruptedRunError: Ctrl-C; run again, it goes on.
        EnvironmentFaultError: A process died, or something cannot be written.
    """
    settings = settings or BuildSettings()
    started = time.monotonic()
    folder = list_folder(images)
    heading = OcrReader(images, settings.reading).heading()
    with ResumeJournal(journal_path(out), heading) as journal:
        # An engine's failure may have been the machine's.
        again = {"engine_failed", "broken_image"} if settings.on_bad_image == "stop" else {"engine_failed"}
        known = _known(journal, images, folder.images)
        new = [path for path in folder.images if path not in known or known[path].reason in again]
        report = BuildReport(
            str(images), str(out), heading, len(folder.images), len(folder.images) - len(new), folder.others
        )
        report.drops += [Drop(path, "broken_image", "its name is not Unicode") for path in folder.unnameable]
        _read(images, new, settings, journal, _counted(progress, report))
        readings = _latest(journal, _known(journal, images, folder.images))
        records = _records(readings, settings, report, _identities(folder.images))
    write_json(out, records)
    report.seconds = time.monotonic() - started
    write_json(report_path(out), report.as_dict())
    if not records:
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.counts.items()) or "there are none"
        raise DataError.at(str(images), f"no picture became a record ({reasons})", f"see {report_path(out)}")
    return report


@dataclass(frozen=True, slots=True)
class _Reading:
    """Where in the journal an image's reading is, and why there is none."""

    place: int
    reason: str | None


def _known(journal: ResumeJournal, images: Path, paths: Sequence[str]) -> dict[str, _Reading]:
    """The images that were read as they are now."""
    expected = {path: file_stamp(images / path) for path in paths}
    found: dict[str, _Reading] = {}
    for place, entry in journal.entries():
        path = entry["path"]
        stamp = {key: entry[key] for key in ("size", "mtime_ns") if key in entry}
        if path in expected and stamp == expected[path]:
            found[path] = _Reading(place, entry.get("reason"))
    return found


def _latest(journal: ResumeJournal, known: Mapping[str, _Reading]) -> Iterator[dict[str, Any]]:
    for place, entry in journal.entries():
        if entry["path"] in known and known[entry["path"]].place == place:
            yield entry


def _counted(progress: Progress | None, report: BuildReport) -> Callable[[], None]:
    done = report.resumed

    def count() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, report.images)

    return count


def _read(
    images: Path, paths: list[str], settings: BuildSettings, journal: ResumeJournal, count: Callable[[], None]
) -> None:
    def look(entry: Mapping[str, Any]) -> None:
        count()
        if settings.on_bad_image == "stop" and entry.get("reason") == "broken_image":
            raise ImageError(entry["error"])

    read_images(images, paths, settings.reading, journal, settings.workers or os.cpu_count() or 1, look)


def _records(
    readings: Iterator[dict[str, Any]], settings: BuildSettings, report: BuildReport, identities: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Judges readings, leaves copies out and writes what is left, in the order of the images' paths.

    Beside what the format asks for a record says how large its image and letters are, for ``eval diagnose``.
    """
    good: dict[str, Candidate] = {}
    sizes: dict[str, dict[str, float]] = {}
    for entry in readings:
        candidate = _candidate(entry, settings, report)
        if candidate is not None:
            good[candidate.path] = candidate
            sizes[candidate.path] = _sizes(entry, settings)
    copies = {} if settings.keep_duplicates else find_duplicates(list(good.values()))
    for path, original in copies.items():
        del good[path]
        report.drops.append(Drop(path, "duplicate", f"of {original}"))
    report.drops.sort(key=lambda drop: drop.path)
    records = []
    for path in sorted(good):
        text = good[path].text
        records.append(make_ocr_record(identities[path], path, text, settings.seed) | sizes[path])
        report.letters += letter_count(text)
        report.scripts += script_counts(text)
    report.kept = len(records)
    return records


def _candidate(entry: Mapping[str, Any], settings: BuildSettings, report: BuildReport) -> Candidate | None:
    path = entry["path"]
    if "error" in entry:
        report.drops.append(Drop(path, entry["reason"], entry["error"]))
        return None
    readings = [[OcrLine.from_json(line) for line in entry["lines"][name]] for name in settings.reading.engines]
    verdict = judge_quality(readings[0], settings.limits, readings[1] if settings.reading.both else None)
    report.lines += verdict.lines
    report.lines_left_out += verdict.left_out
    if verdict.reason is not None:
        reason = "blank_page" if verdict.reason == "no_text" and entry["blank"] else verdict.reason
        report.drops.append(Drop(path, reason, verdict.detail))
        return None
    return Candidate(path, entry["width"] * entry["height"], int(entry["hash"], 16), verdict.text)


def _sizes(entry: Mapping[str, Any], settings: BuildSettings) -> dict[str, float]:
    """The image's size, and the median height of its lines, in its pixels."""
    lines = confident(map(OcrLine.from_json, entry["lines"][settings.reading.engine]), settings.limits)
    height = median(box.height for box in upright_boxes(lines))
    return {"image_width": entry["width"], "image_height": entry["height"], "text_height": round(height, 1)}


def _identities(paths: Sequence[str]) -> dict[str, str]:
    """Ids as the released data have them, paths without extension; with it where two would be the same."""
    stems = {path: str(PurePosixPath(path).with_suffix("")) for path in paths}
    used = Counter(stems.values())
    return {path: stem if used[stem] == 1 else path for path, stem in stems.items()}


def make_ocr_record(identity: str, image: str, text: str, seed: int) -> dict[str, Any]:
    """Write an image's text as an answer to one of the ten instructions.

    Args:
        identity: The record's id.
        image: Its image's path.
        text: The answer.
        seed: With the id draws the instruction, and whether the image stands before or after it.

    Returns:
        A record in the released format.
    """
    rng = Random(f"{seed}/{identity}")
    question = rng.choice(OCR_INSTRUCTIONS)
    asked = rng.choice((f"{IMAGE_PLACEHOLDER}\n{question}", f"{question}\n{IMAGE_PLACEHOLDER}"))
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": text}]
    return {"id": identity, "image": image, "conversations": turns}
