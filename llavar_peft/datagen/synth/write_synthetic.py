"""Many synthetic images with their records and their truth, by several processes."""

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

from llavar_peft.atomic_files import write_json, write_text
from llavar_peft.datagen.synth.drawn_page import describe_page, draw_page
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.errors import EnvironmentFaultError

IMAGES: Final = "images"
RECORDS: Final = "records.json"
TRUTH: Final = "truth.jsonl"
_FEW: Final = 32  # images that one process draws in less time than others take to start


@dataclass(frozen=True, slots=True)
class SynthResult:
    """What was written.

    Attributes:
        records: The records' file.
        truth: A line for each image, with every line's text and box.
        images: The folder that the records' paths start from.
        image_count: How many.
        lines: Lines of text in them.
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
    """Draw images and writes them with their records and their truth.

    Args:
        out: Gets ``images/``, ``records.json`` and ``truth.jsonl``, the last two when all images are there.
        count: How many.
        settings: What is drawn; None for the defaults.
        workers: Processes; None is one for each CPU. Their number changes nothing that is written.
        progress: Called with (images drawn, images in all).

    Returns:
        What was written.

    Raises:
        ConfigError: There are no words of a language.
        DataError: No font can write a language, or a font cannot be read.
        EnvironmentFaultError: Something cannot be written.
    """
    settings = settings or SynthSettings()
    records, truths = [], []
    try:
        (out / IMAGES).mkdir(parents=True, exist_ok=True)
        for done, (record, truth) in enumerate(_drawn(out, count, settings, workers or os.cpu_count() or 1), 1):
            records.append(record)
            truths.append(truth)
            if progress is not None:
                progress(done, count)
        write_text(out / TRUTH, "".join(json.dumps(truth, ensure_ascii=False) + "\n" for truth in truths))
        write_json(out / RECORDS, records)
    except OSError as error:
        raise EnvironmentFaultError.at(
            str(error.filename or out), f"cannot be written ({error.strerror})", "free some space, or write elsewhere"
        ) from error
    lines = sum(len(truth["lines"]) for truth in truths)
    return SynthResult(out / RECORDS, out / TRUTH, out / IMAGES, len(records), lines)


def _drawn(
    out: Path, count: int, settings: SynthSettings, workers: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    draw = partial(_draw, out / IMAGES, settings)
    if workers == 1 or count <= _FEW:
        yield from map(draw, range(count))
        return
    with ProcessPoolExecutor(
        workers,
        _context(),
        initializer=signal.signal,  # Ctrl-C is for the parent to answer
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:
        yield from pool.map(draw, range(count), chunksize=8)


def _context() -> BaseContext:
    """How processes start: forked ones at once, but only a process of one thread may fork safely.

    Spawned ones import everything anew and run the caller's script once more.
    """
    alone = sys.platform == "linux" and len(os.listdir("/proc/self/task")) == 1
    return get_context("fork" if alone else "spawn")


def _draw(images: Path, settings: SynthSettings, index: int) -> tuple[dict[str, Any], dict[str, Any]]:
    name, data, record, truth = describe_page(draw_page(settings, index), index, settings)
    (images / name).write_bytes(data)
    return record, truth
