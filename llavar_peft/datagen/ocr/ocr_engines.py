"""OCR engines: RapidOCR, whose models come with its package, and Tesseract, a program of the system.

Both run offline in a single thread: images are read in parallel by several processes.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

import numpy as np

from llavar_peft.errors import EnvironmentFaultError, LlavarError, MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

Point: TypeAlias = tuple[float, float]
EngineName: TypeAlias = Literal["rapidocr", "tesseract"]

SECONDS_PER_IMAGE: Final = 120
"""Time limit of Tesseract; a page of a book takes it about 5 seconds."""

_MAX_ASPECT: Final = 6  # ratio of the sides of an image given to RapidOCR


class OcrError(LlavarError, RuntimeError):
    """An engine failed on one image."""


@dataclass(frozen=True, slots=True)
class OcrLine:
    """A run of text that an engine recognized as one piece.

    Attributes:
        text: The text, without white space at its ends.
        polygon: Its four corners in pixels, clockwise from the top left in reading direction.
        confidence: The engine's confidence, from 0 to 1.
    """

    text: str
    polygon: tuple[Point, Point, Point, Point]
    confidence: float

    def as_json(self) -> list[Any]:
        """Return text, eight coordinates rounded to a tenth of a pixel, and confidence."""
        return [self.text, [round(value, 1) for point in self.polygon for value in point], round(self.confidence, 4)]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> OcrLine:
        """Return the line from the form of ``as_json``. Raises ``ValueError`` or ``TypeError`` for another form."""
        text, flat, confidence = value
        points = [(float(x), float(y)) for x, y in zip(flat[::2], flat[1::2], strict=True)]
        first, second, third, fourth = points
        return cls(str(text), (first, second, third, fourth), float(confidence))


def letter_count(text: str) -> int:
    """Return the number of letters and digits."""
    return sum(character.isalnum() for character in text)


class OcrEngine(Protocol):
    """An OCR engine. An instance serves one process, one image at a time."""

    @property
    def name(self) -> EngineName:
        """Name of the engine."""
        ...

    @property
    def version(self) -> str:
        """Version of the engine and of its models or languages, which readings depend on."""
        ...

    def read(self, image: Image) -> tuple[OcrLine, ...]:
        """Return the lines of an RGB image, in any order. Raises ``OcrError``."""
        ...


def open_ocr_engine(name: EngineName, languages: str = "eng") -> OcrEngine:
    """Return an engine, which loads its models at the first image.

    Args:
        name: Which engine.
        languages: Languages of Tesseract, for example ``"eng+deu"``. RapidOCR ignores them: its model reads Chinese,
            Japanese and languages in Latin script at once.

    Raises:
        MissingDependencyError: The engine or one of the languages is not installed.
    """
    return RapidOcr() if name == "rapidocr" else Tesseract(languages)


class RapidOcr:
    """PaddleOCR's detection and recognition on ONNX Runtime, from the package ``rapidocr``."""

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
        """Version of the package, which determines the models."""
        return importlib.metadata.version("rapidocr")

    @cached_property
    def _reader(self) -> Any:
        from rapidocr import RapidOCR

        return RapidOCR(
            params={
                "Global.log_level": "error",
                "Global.text_score": 0.0,  # the quality filter decides later, and records the reason
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def read(self, image: Image) -> tuple[OcrLine, ...]:
        """Return the image's lines. Raises ``OcrError``."""
        pixels_HWC = np.ascontiguousarray(np.asarray(_pad_strip(image))[:, :, ::-1])  # RGB to OpenCV's BGR
        try:
            found = self._reader(pixels_HWC)
        except Exception as error:
            raise OcrError.at("rapidocr", f"failed ({type(error).__name__}: {error})", "leave the image out") from error
        if found.boxes is None or found.txts is None:
            return ()
        lines = []
        for box, text, score in zip(found.boxes, found.txts, found.scores, strict=True):
            first, second, third, fourth = ((float(x), float(y)) for x, y in box)
            if text.strip():
                lines.append(OcrLine(text.strip(), (first, second, third, fourth), float(score)))
        return tuple(lines)


def _pad_strip(image: Image) -> Image:
    """Pad a strip with white: RapidOCR scales the shorter side to 736, which makes 3 x 500 pixels 120,000 long."""
    least = -(-max(image.size) // _MAX_ASPECT)
    if min(image.size) >= least:
        return image
    from PIL import Image as Pillow

    padded = Pillow.new("RGB", (max(image.width, least), max(image.height, least)), "white")
    padded.paste(image)
    return padded


class Tesseract:
    """The program ``tesseract``, called once for each image.

    Args:
        languages: For example ``"eng+deu"``.

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
        installed = set(self._run(["--list-langs"]).decode().split())
        missing = [language for language in languages.split("+") if language not in installed]
        if missing:
            raise MissingDependencyError.at(
                "tesseract",
                f"cannot read {', '.join(missing)}",
                f"install its data (Debian: tesseract-ocr-{missing[0]}); --list-langs shows what is installed",
            )

    @cached_property
    def version(self) -> str:
        """Version of the program, and the languages."""
        return f"{self._run(['--version']).decode().split()[1]} {self._languages}"

    def read(self, image: Image) -> tuple[OcrLine, ...]:
        """Return the image's lines. Raises ``OcrError``."""
        file = io.BytesIO()
        image.save(file, "PPM")
        table = self._run(["stdin", "stdout", "-l", self._languages, "--psm", "3", "tsv"], file.getvalue()).decode()
        rows = csv.DictReader(io.StringIO(table), delimiter="\t", quoting=csv.QUOTE_NONE)
        words = [row for row in rows if row["level"] == "5" and (row["text"] or "").strip()]
        return tuple(_join_words(list(group)) for _, group in groupby(words, _line_key))

    def _run(self, arguments: list[str], stdin: bytes = b"") -> bytes:
        try:
            done = subprocess.run(
                [self._program, *arguments],
                input=stdin,
                capture_output=True,
                check=True,
                timeout=SECONDS_PER_IMAGE,
                env={**os.environ, "OMP_THREAD_LIMIT": "1"},
            )
        except subprocess.CalledProcessError as error:
            message = error.stderr.decode(errors="replace").strip()[-200:]
            raise OcrError.at("tesseract", f"failed ({message})", "leave the image out") from error
        except subprocess.TimeoutExpired as error:
            raise OcrError.at(
                "tesseract", f"took more than {SECONDS_PER_IMAGE} s", "leave the image out, or scale it down"
            ) from error
        except OSError as error:
            raise EnvironmentFaultError.at(self._program, f"cannot be started ({error})", "install it again") from error
        return done.stdout


def _line_key(word: Mapping[str, str]) -> tuple[str, ...]:
    return word["block_num"], word["par_num"], word["line_num"]


def _join_words(words: Iterable[Mapping[str, str]]) -> OcrLine:
    """Join words into a line, with the box around them and the mean confidence of their letters."""
    words = list(words)
    weights = [max(1, letter_count(word["text"])) for word in words]
    confidence = sum(max(0.0, float(word["conf"])) * weight for word, weight in zip(words, weights, strict=True))
    boxes = [tuple(float(word[key]) for key in ("left", "top", "width", "height")) for word in words]
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    corners = ((left, top), (right, top), (right, bottom), (left, bottom))
    return OcrLine(" ".join(word["text"].strip() for word in words), corners, confidence / sum(weights) / 100)
