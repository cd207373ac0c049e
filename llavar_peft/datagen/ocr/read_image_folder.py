"""OCR of a folder of images by several processes, with each result written to a journal at once."""

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
from llavar_peft.data.pdf_pages import PdfDocument, locate_page
from llavar_peft.data.resume_journal import ResumeJournal
from llavar_peft.datagen.ocr.duplicate_images import difference_hash, is_blank
from llavar_peft.datagen.ocr.ocr_engines import open_ocr_engine
from llavar_peft.datagen.ocr.ocr_lines import EngineName, OcrEngine, OcrError, OcrLine, scale_line
from llavar_peft.datagen.ocr.page_profile import PAPER_EDGE, Profile, ProfileChoice, choose_profile
from llavar_peft.datagen.ocr.page_text import lines_of_page
from llavar_peft.errors import EnvironmentFaultError, ImageError, InterruptedRunError

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST: Final = 4096
"""Maximum length in pixels to which a side is enlarged: a strip of 600 x 1 would become 230,400 wide."""
SECOND_SIZE: Final[dict[EngineName, float]] = {"rapidocr": 0.8, "tesseract": 1.25}
"""Size of the second reading of an image as a fraction of the first. Tesseract misreads pages of less than 150 dpi."""
_AHEAD: Final = 4  # images queued per process, so that no process waits
_LEAST_IMAGES: Final = 4  # images for which a process is worth its start, which loads the engines


@dataclass(frozen=True, kw_only=True)
class ReadingSettings:
    """How images are read; readings with other settings are not reused.

    Attributes:
        engine: The engine whose text is used.
        both: Whether the other engine reads the images too, for comparison.
        profile: How large images are read: ``"scene"`` and ``"paper"`` with the paper's short edge, ``"page"`` in full
            size, ``"auto"`` as a scene or a page, whichever the image is.
        short_edge: Length in pixels to which the shorter side is scaled instead, 0 for the full size.
        languages: Languages of Tesseract.
        page_text: Whether the own text of a page of a PDF document is used, where it has a plausible one.
        twice: Paths of images that are read a second time in another size, to estimate the error rate.
    """

    engine: EngineName = "rapidocr"
    both: bool = False
    profile: ProfileChoice = "auto"
    short_edge: int | None = None
    languages: str = "eng"
    page_text: bool = True
    twice: frozenset[str] = frozenset()

    @property
    def engines(self) -> tuple[EngineName, ...]:
        """The engines that read, first the one whose text is used."""
        other: EngineName = "tesseract" if self.engine == "rapidocr" else "rapidocr"
        return (self.engine, other) if self.both else (self.engine,)


class OcrReader:
    """Reads images in a folder, in one process.

    Raises:
        MissingDependencyError: An engine is not installed.
        ImageError: The folder does not exist.
    """

    def __init__(self, folder: Path, settings: ReadingSettings) -> None:
        self._roots = ImageRoots(folder)
        self._settings = settings
        self._engines = [open_ocr_engine(name, settings.languages) for name in settings.engines]

    def heading(self) -> dict[str, Any]:
        """Return the journal's heading: what readings depend on."""
        settings = self._settings
        size = {"profile": settings.profile} if settings.short_edge is None else {"short_edge": settings.short_edge}
        return {
            "format": 3,
            "engines": {engine.name: engine.version for engine in self._engines},
            **size,
            **({} if settings.page_text else {"page_text": False}),
        }

    def __call__(self, path: str) -> dict[str, Any]:
        """Return the journal's entry for an image, with ``error`` instead of ``lines`` if it cannot be read."""
        entry: dict[str, Any] = {"path": path, **file_stamp(self._roots.roots[0] / path)}
        try:
            image, lines, why_read = self._open(path)
            entry |= {"width": image.width, "height": image.height, "hash": f"{difference_hash(image):064x}"}
            entry["blank"] = is_blank(image)
            entry |= {} if why_read is None else {"page": why_read}
            if lines is None:
                self._read(entry, image)
            else:
                entry["lines"] = {engine.name: [line.as_json() for line in lines] for engine in self._engines}
        except (ImageError, OcrError) as error:
            entry.pop("lines", None)
            entry["error"] = str(error)
            entry["reason"] = "broken_image" if isinstance(error, ImageError) else "engine_failed"
        return entry

    def _read(self, entry: dict[str, Any], image: Image) -> None:
        """Add the lines that the engines read to an entry."""
        profile = self._choose_profile(image)
        entry |= {"profile": profile} if profile else {}
        scaled, scale = bring_short_edge(image, self._short_edge(image, profile))
        entry["lines"] = {engine.name: _read_lines(engine, scaled, scale) for engine in self._engines}
        if entry["path"] in self._settings.twice:
            engine = self._engines[0]
            other, scale = bring_short_edge(image, max(1, round(min(scaled.size) * SECOND_SIZE[engine.name])))
            entry["again"] = _read_lines(engine, other, scale)

    def _open(self, path: str) -> tuple[Image, tuple[OcrLine, ...] | None, str | None]:
        """Open an image; for a page of a PDF document, return its own text or why that cannot be used, too."""
        file, number = locate_page(self._roots.resolve(path))
        document = PdfDocument.of(file, path)
        if document is None:
            return self._roots.open(path), None, None
        page = document.page(document.number(number), text=self._settings.page_text)
        if not self._settings.page_text:
            return page.image, None, "not asked for"
        lines, why_not = lines_of_page(page)
        return page.image, None if why_not else lines, why_not or ""

    def _choose_profile(self, image: Image) -> Profile | None:
        settings = self._settings
        if settings.short_edge is not None:
            return None
        if settings.profile != "auto":
            return "page" if settings.profile == "page" else "scene"
        small, _ = bring_short_edge(image, PAPER_EDGE)
        return choose_profile(small, self._engines[0].find(small))

    def _short_edge(self, image: Image, profile: Profile | None) -> int:
        if profile is None:
            return self._settings.short_edge or 0
        return PAPER_EDGE if profile == "scene" else max(PAPER_EDGE, min(image.size))


def _read_lines(engine: OcrEngine, image: Image, scale: float) -> list[list[Any]]:
    """Return the lines of an image, in pixels of the image from which it was scaled."""
    return [scale_line(line, 1 / scale).as_json() for line in engine.read(image)]


def bring_short_edge(image: Image, short_edge: int) -> tuple[Image, float]:
    """Scale an image up or down, as the paper does before OCR.

    Args:
        image: RGB.
        short_edge: Length of the shorter side in pixels, 0 to keep the image.

    Returns:
        The image and the scale, reduced if a side would exceed ``LONGEST``.

    Source: arXiv 2306.17107, section 3.
    """
    from PIL.Image import Resampling

    if not short_edge:
        return image, 1.0
    scale = min(short_edge / min(image.size), max(1.0, LONGEST / max(image.size)))
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return (image, 1.0) if size == image.size else (image.resize(size, Resampling.BICUBIC), scale)


def file_stamp(path: Path) -> dict[str, int]:
    """Return a file's size and modification time, which reveal a change; empty if the file does not exist."""
    try:
        status = os.stat(locate_page(path)[0])
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
    """Read images and append each result to a journal.

    Args:
        paths: Paths within the folder.
        journal: Gets one entry for each image, in any order.
        workers: Number of processes at most; one that would read fewer than four images is not started. 1 reads in this
            process.
        on_entry: Called after each image; an error it raises stops the work.

    Raises:
        InterruptedRunError: Ctrl-C was pressed; results so far are kept.
        EnvironmentFaultError: A process died.
    """
    try:
        for entry in _entries(folder, paths, settings, workers):
            journal.append(entry)
            on_entry(entry)
    except KeyboardInterrupt:
        raise InterruptedRunError.at(
            str(journal.path), "interrupted; results so far are kept", "run the same command again to resume"
        ) from None


def _entries(folder: Path, paths: Sequence[str], settings: ReadingSettings, workers: int) -> Iterator[dict[str, Any]]:
    workers = min(workers, -(-len(paths) // _LEAST_IMAGES))
    if workers <= 1:
        yield from map(OcrReader(folder, settings), paths)
        return
    # Spawned, not forked: ONNX Runtime's threads do not survive a fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (folder, settings))
    waiting = iter(paths)
    running: dict[Future[dict[str, Any]], str] = {}
    try:
        while True:
            for path in islice(waiting, workers * _AHEAD - len(running)):
                running[pool.submit(_read_in_worker, path)] = path
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                entry = done.result()
                del running[done]
                yield entry
    except BrokenProcessPool:
        raise EnvironmentFaultError.at(
            str(folder),
            f"a worker process died while reading one of {', '.join(sorted(running.values())[:_AHEAD])}",
            "run the same command again to resume, with fewer workers if memory is short",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_reader: OcrReader | None = None  # of a worker process, which loads the engines once


def _start_worker(folder: Path, settings: ReadingSettings) -> None:
    global _reader  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    _reader = OcrReader(folder, settings)


def _read_in_worker(path: str) -> dict[str, Any]:
    if _reader is None:
        raise RuntimeError("the process was not started by _start_worker")
    return _reader(path)
