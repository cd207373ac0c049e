"""The two engines: RapidOCR, whose models come with its package, and Tesseract, a program of the system.

Neither goes to the network, and each keeps to one thread: images are read in parallel by processes.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from llavar_peft.datagen.ocr.ocr_lines import EngineName, OcrEngine, OcrLine, letter_count
from llavar_peft.errors import EnvironmentFaultError, LlavarError, MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

SECONDS_PER_IMAGE: Final = 120
"""After which Tesseract is taken to be stuck; a page of a book takes it about five."""

_LONGEST_RATIO: Final = 6  # of the sides of what RapidOCR is given


class OcrError(LlavarError, RuntimeError):
    """An engine failed on one image."""


def open_ocr_engine(name: EngineName, languages: str = "eng") -> OcrEngine:
    """Make an engine ready; its models are loaded at the first image.

    Args:
        name: Which one.
        languages: For Tesseract, in its spelling, e.g. ``"eng+deu"``. RapidOCR's model reads Chinese, Japanese and
            languages in Latin letters at once, and has no such setting.

    Returns:
        The engine.

    Raises:
        MissingDependencyError: It is not installed, or lacks a language.
    """
    return RapidOcr() if name == "rapidocr" else Tesseract(languages)


class RapidOcr:
    """PaddleOCR's detection and recognition on ONNX Runtime, by the package ``rapidocr``."""

    name: EngineName = "rapidocr"

    def __init__(self) -> None:
        try:
            import onnxruntime  # noqa: F401
            import rapidocr  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError.at(
                "rapidocr", f"is not installed ({error})", "pip install 'llavar-peft[ocr]'"
            ) from error

    @property
    def version(self) -> str:
        """Of the package, which decides on the models."""
        return importlib.metadata.version("rapidocr")

    @cached_property
    def _reader(self) -> Any:
        from rapidocr import RapidOCR

        return RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.text_score": 0.0,  # what is good enough is decided later, with a reason
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def read(self, image: Image) -> tuple[OcrLine, ...]:
        """Return the image's lines. Raises ``OcrError``."""
        pixels_HWC = np.ascontiguousarray(np.asarray(_widened(image))[:, :, ::-1])  # OpenCV's order of colours
        try:
            found = self._reader(pixels_HWC)
        except Exception as error:
            raise OcrError.at(
                "rapidocr", f"failed ({type(error).__name__}: {error})", "leave the picture out"
            ) from error
        if found.boxes is None or found.txts is None:
            return ()
        lines = []
        for box, text, score in zip(found.boxes, found.txts, found.scores, strict=True):
            first, second, third, fourth = ((float(x), float(y)) for x, y in box)
            if text.strip():
                lines.append(OcrLine(text.strip(), (first, second, third, fourth), float(score)))
        return tuple(lines)


def _widened(image: Image) -> Image:
    """Add white to a strip: RapidOCR brings the shorter side to 736, which makes 120,000 pixels of 3 x 500."""
    least = -(-max(image.size) // _LONGEST_RATIO)
    if min(image.size) >= least:
        return image
    from PIL import Image as Pillow

    widened = Pillow.new("RGB", (max(image.width, least), max(image.height, least)), "white")
    widened.paste(image)
    return widened


class Tesseract:
    """The program ``tesseract``, called once for each image.

    Args:
        languages: In its spelling, e.g. ``"eng+deu"``.

    Raises:
        MissingDependencyError: The program or a language is not installed.
    """

    name: EngineName = "tesseract"

    def __init__(self, languages: str = "eng") -> None:
        program = shutil.which("tesseract")
        if program is None:
            raise MissingDependencyError.at(
                "tesseract", "the program is not installed", "install it (Debian: apt-get install tesseract-ocr)"
            )
        self._program = program
        self._languages = languages
        there = set(self._run(["--list-langs"]).decode().split())
        missing = [language for language in languages.split("+") if language not in there]
        if missing:
            raise MissingDependencyError.at(
                "tesseract",
                f"cannot read {', '.join(missing)}",
                f"install its data (Debian: tesseract-ocr-{missing[0]}); --list-langs shows what is there",
            )

    @cached_property
    def version(self) -> str:
        """The program's and the languages it reads."""
        return f"{self._run(['--version']).decode().split()[1]} {self._languages}"

    def read(self, image: Image) -> tuple[OcrLine, ...]:
        """Return the image's lines. Raises ``OcrError``."""
        file = io.BytesIO()
        image.save(file, "PPM")
        table = self._run(["stdin", "stdout", "-l", self._languages, "--psm", "3", "tsv"], file.getvalue()).decode()
        rows = csv.DictReader(io.StringIO(table), delimiter="\t", quoting=csv.QUOTE_NONE)
        words = [row for row in rows if row["level"] == "5" and (row["text"] or "").strip()]
        return tuple(_line(list(group)) for _, group in groupby(words, _line_of))

    def _run(self, arguments: list[str], given: bytes = b"") -> bytes:
        try:
            done = subprocess.run(
                [self._program, *arguments],
                input=given,
                capture_output=True,
                check=True,
                timeout=SECONDS_PER_IMAGE,
                env={**os.environ, "OMP_THREAD_LIMIT": "1"},
            )
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip()[-200:]
            raise OcrError.at("tesseract", f"failed ({said})", "leave the picture out") from error
        except subprocess.TimeoutExpired as error:
            raise OcrError.at(
                "tesseract", f"took more than {SECONDS_PER_IMAGE} s", "leave the picture out, or scale it down"
            ) from error
        except OSError as error:
            raise EnvironmentFaultError.at(self._program, f"cannot be started ({error})", "install it again") from error
        return done.stdout


def _line_of(word: Mapping[str, str]) -> tuple[str, ...]:
    return word["block_num"], word["par_num"], word["line_num"]


def _line(words: Iterable[Mapping[str, str]]) -> OcrLine:
    """One line from its words: the box around them, the confidence of an average letter."""
    words = list(words)
    weights = [max(1, letter_count(word["text"])) for word in words]
    confidence = sum(max(0.0, float(word["conf"])) * weight for word, weight in zip(words, weights, strict=True))
    boxes = [tuple(float(word[key]) for key in ("left", "top", "width", "height")) for word in words]
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    corners = ((left, top), (right, top), (right, bottom), (left, bottom))
    return OcrLine(" ".join(word["text"].strip() for word in words), corners, confidence / sum(weights) / 100)
