"""OCR of a folder of images: by several processes, each result kept at once, nothing read twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.resume_journal import ResumeJournal
from llavar_peft.datagen.ocr.duplicate_images import difference_hash, is_blank
from llavar_peft.datagen.ocr.ocr_engines import OcrError, open_ocr_engine
from llavar_peft.datagen.ocr.ocr_lines import EngineName, OcrLine
from llavar_peft.errors import EnvironmentFaultError, ImageError, InterruptedRunError

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST: Final = 4096
"""Pixels that no side is enlarged beyond: a strip of 600 x 1 would become 230,400 wide."""
SUFFIXES: Final = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif", ".mpo")
)
_AHEAD: Final = 4  # images handed out for each process, so that none ever waits


@dataclass(frozen=True, kw_only=True)
class ReadingSettings:
    """How images are read; another setting reads them again.

    Attributes:
        engine: Whose text is taken.
        both: Whether the other engine reads too, to be compared.
        short_edge: Pixels that the shorter side is brought to before reading, 0 for none. The default is the paper's.
        languages: For Tesseract.
    """

    engine: EngineName = "rapidocr"
    both: bool = False
    short_edge: int = 384
    languages: str = "eng"

    @property
    def engines(self) -> tuple[EngineName, ...]:
        """Those that read, the one whose text is taken first."""
        other: EngineName = "tesseract" if self.engine == "rapidocr" else "rapidocr"
        return (self.engine, other) if self.both else (self.engine,)


class OcrReader:
    """Reads images below a folder, in one process.

    Args:
        folder: Where their paths start.
        settings: How.

    Raises:
        MissingDependencyError: An engine is not installed.
        ImageError: There is no such folder.
    """

    def __init__(self, folder: Path, settings: ReadingSettings) -> None:
        self._roots = ImageRoots(folder)
        self._settings = settings
        self._engines = [open_ocr_engine(name, settings.languages) for name in settings.engines]

    def heading(self) -> dict[str, Any]:
        """What readings depend on."""
        return {
            "format": 2,
            "engines": {engine.name: engine.version for engine in self._engines},
            "short_edge": self._settings.short_edge,
        }

    def __call__(self, path: str) -> dict[str, Any]:
        """Return the journal's entry for an image; an image that cannot be read has ``error`` instead of lines."""
        entry: dict[str, Any] = {"path": path, **file_stamp(self._roots.roots[0] / path)}
        try:
            image = self._roots.open(path)
            scaled, scale = bring_short_edge(image, self._settings.short_edge)
            entry |= {"width": image.width, "height": image.height, "hash": f"{difference_hash(image):064x}"}
            entry["blank"] = is_blank(image)
            entry["lines"] = {
                engine.name: [_scaled(line, 1 / scale).as_json() for line in engine.read(scaled)]
                for engine in self._engines
            }
        except (ImageError, OcrError) as error:
            entry["error"] = str(error)
            entry["reason"] = "broken_image" if isinstance(error, ImageError) else "engine_failed"
        return entry


def bring_short_edge(image: Image, short_edge: int) -> tuple[Image, float]:
    """Scale an image, up or down, as the paper does before OCR.

    Args:
        image: RGB.
        short_edge: Pixels of the shorter side, 0 to leave it.

    Returns:
        The image and the factor, smaller where a side would grow beyond ``LONGEST``.

    Source: arXiv 2306.17107, section 3.
    """
    from PIL.Image import Resampling

    if not short_edge:
        return image, 1.0
    scale = min(short_edge / min(image.size), max(1.0, LONGEST / max(image.size)))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return (image, 1.0) if size == image.size else (image.resize(size, Resampling.BICUBIC), scale)


def _scaled(line: OcrLine, factor: float) -> OcrLine:
    a, b, c, d = ((x * factor, y * factor) for x, y in line.polygon)
    return OcrLine(line.text, (a, b, c, d), line.confidence)


@dataclass(frozen=True)
class Folder:
    """What lies in a folder of images.

    Attributes:
        images: Files with an image's extension, as paths within the folder, with ``/``, sorted.
        unnameable: Such files whose names are not Unicode, so that no record can name them, in a readable form.
        others: Number of all other files.
    """

    images: tuple[str, ...]
    unnameable: tuple[str, ...]
    others: int


def list_folder(folder: Path) -> Folder:
    """List images below a folder by their extensions, hidden files aside. Raises ``ImageError``: no such folder."""
    ImageRoots(folder)
    found, unnameable, others = list[str](), list[str](), 0
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = (Path(place) / name).relative_to(folder).as_posix()
            if Path(name).suffix.lower() not in SUFFIXES or name.startswith("."):
                others += 1
            elif any("\ud800" <= character <= "\udfff" for character in path):
                unnameable.append(path.encode(errors="backslashreplace").decode())
            else:
                found.append(path)
    return Folder(tuple(sorted(found)), tuple(sorted(unnameable)), others)


def file_stamp(path: Path) -> dict[str, int]:
    """Size and time of a file, which tell a changed one; empty where there is none."""
    try:
        status = path.stat()
    except OSError:
        return {}
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def read_images(
    folder: Path,
    paths: Sequence[str],
    settings: ReadingSettings,
    journal: ResumeJournal,
    workers: int,
    on_entry: Callable[[Mapping[str, Any]], None],
) -> None:
    """Read images and writes each result to the journal as it comes.

    Args:
        folder: Where the paths start.
        paths: The images.
        settings: How.
        journal: Gets one entry for each, in no certain order.
        workers: Processes; 1 reads in this one.
        on_entry: Called after each; an error it raises stops the work.

    Raises:
        InterruptedRunError: Ctrl-C; what was read is kept.
        EnvironmentFaultError: A process died.
    """
    try:
        for entry in _entries(folder, paths, settings, workers):
            journal.append(entry)
            on_entry(entry)
    except KeyboardInterrupt:
        raise InterruptedRunError.at(
            str(journal.path), "stopped; what was read is kept", "run the same command again to go on"
        ) from None


def _entries(folder: Path, paths: Sequence[str], settings: ReadingSettings, workers: int) -> Iterator[dict[str, Any]]:
    if workers == 1 or len(paths) <= 1:
        yield from map(OcrReader(folder, settings), paths)
        return
    # Spawned, not forked: ONNX Runtime's threads do not survive a fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (folder, settings))
    waiting = iter(paths)
    running: dict[Future[dict[str, Any]], str] = {}
    try:
        while True:
            for path in islice(waiting, workers * _AHEAD - len(running)):
                running[pool.submit(_read, path)] = path
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                entry = done.result()
                del running[done]
                yield entry
    except BrokenProcessPool:
        raise EnvironmentFaultError.at(
            str(folder),
            f"a process that read pictures died, at one of {', '.join(sorted(running.values())[:_AHEAD])}",
            "run the same command again: it goes on; where memory is short, with fewer workers",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_reader: OcrReader | None = None  # of a worker process: engines are loaded once for all its images


def _start(folder: Path, settings: ReadingSettings) -> None:
    global _reader  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _reader = OcrReader(folder, settings)


def _read(path: str) -> dict[str, Any]:
    if _reader is None:
        raise RuntimeError("the process was not started by _start")
    return _reader(path)
