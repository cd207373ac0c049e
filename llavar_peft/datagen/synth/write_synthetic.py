"""Write synthetic images with their records and ground truth, using several processes."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, Final

from llavar_peft.atomic_files import check_output_folder, disk_errors, hold_lock, write_json, write_text
from llavar_peft.compat.usable_cores import usable_cores
from llavar_peft.datagen.synth.drawn_page import draw_page
from llavar_peft.datagen.synth.height_page import draw_at_height
from llavar_peft.datagen.synth.synth_record import describe_page
from llavar_peft.datagen.synth.synth_settings import SynthSettings

IMAGES: Final = "images"
RECORDS: Final = "records.json"
TRUTH: Final = "truth.jsonl"
_FEW: Final = 32  # images up to which one process is faster than starting others


@dataclass(frozen=True, slots=True)
class SynthResult:
    """Files written by ``write_synthetic``.

    Attributes:
        truth: JSON lines with the text and box of every line of each image.
        images: The folder of the images.
        lines: Number of lines of text in all images.
    """

    records: Path
    truth: Path
    images: Path
    image_count: int
    lines: int


def write_synthetic(
    out: Path,
    count: int,
    settings: SynthSettings | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SynthResult:
    """Draw images and write them with their records and ground truth.

    Args:
        out: Folder that gets ``images/`` and, when all images are complete, ``records.json`` and ``truth.jsonl``.
        workers: Number of processes, None for one per usable core. It does not affect the result.
        progress: Called with the number of images drawn and in total.

    Raises:
        ConfigError: A language has no vocabulary, or letters cannot have one of the heights.
        DataError: No font has all letters of a language, or a font cannot be read.
        EnvironmentFaultError: A file cannot be written, or another process is writing the folder.
    """
    settings = settings or SynthSettings()
    records, truths = [], []
    check_output_folder(out, "--out")
    with hold_lock(out / ".lock", where=out), disk_errors(out):
        (out / IMAGES).mkdir(parents=True, exist_ok=True)
        # The records of an earlier run do not describe the images that are drawn now.
        for name in (RECORDS, TRUTH):
            (out / name).unlink(missing_ok=True)
        for done, (record, truth) in enumerate(_draw_all(out, count, settings, workers or usable_cores()), 1):
            records.append(record)
            truths.append(truth)
            if progress is not None:
                progress(done, count)
        write_text(out / TRUTH, "".join(json.dumps(truth, ensure_ascii=False) + "\n" for truth in truths))
        write_json(out / RECORDS, records)
    lines = sum(len(truth["lines"]) for truth in truths)
    return SynthResult(out / RECORDS, out / TRUTH, out / IMAGES, len(records), lines)


def _draw_all(
    out: Path, count: int, settings: SynthSettings, workers: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    draw = partial(_draw_and_save, out / IMAGES, settings)
    if workers == 1 or count <= _FEW:
        yield from map(draw, range(count))
        return
    with ProcessPoolExecutor(
        workers,
        _context(),
        initializer=_leave_signals_to_parent,
    ) as pool:
        yield from pool.map(draw, range(count), chunksize=8)


def _context() -> BaseContext:
    """Return ``fork`` if this process has a single thread, which makes it safe and is fast, otherwise ``spawn``.

    Spawned processes import all modules again, and also run the caller's script again.
    """
    alone = sys.platform == "linux" and len(os.listdir("/proc/self/task")) == 1
    return get_context("fork" if alone else "spawn")


def _leave_signals_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _draw_and_save(images: Path, settings: SynthSettings, index: int) -> tuple[dict[str, Any], dict[str, Any]]:
    page = draw_at_height(settings, index) if settings.heights else draw_page(settings, index)
    name, data, record, truth = describe_page(page, index, settings)
    (images / name).write_bytes(data)
    return record, truth
