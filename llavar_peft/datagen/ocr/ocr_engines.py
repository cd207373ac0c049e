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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias

import numpy as np

from llavar_peft.datagen.ocr.text_regions import Pixels, cut_line, line_height, scale_pixels
from llavar_peft.errors import EnvironmentFaultError, LlavarError, MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

Point: TypeAlias = tuple[float, float]
Polygon: TypeAlias = tuple[Point, Point, Point, Point]
EngineName: TypeAlias = Literal["rapidocr", "tesseract"]

SECONDS_PER_IMAGE: Final = 120
"""Time limit of Tesseract; a page of a book takes it about 5 seconds."""

_MAX_ASPECT: Final = 6  # ratio of the sides of an image given to RapidOCR
_DETECTION_EDGE: Final = 736  # pixels of the shorter side in which RapidOCR looks for lines, its own default
_DETECTION_LONGEST: Final = 2000  # pixels of the longer side to which an image is enlarged for that
_SMALL_LINE: Final = 14.0  # pixels of a line's box there, below which it looks again in an image twice as large
_DOUBTFUL: Final = 0.85  # confidence below which RapidOCR reads a line upside down too
_CLEARLY: Final = 0.1  # by how much more confident it then has to be


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
    polygon: Polygon
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


def scale_line(line: OcrLine, factor: float) -> OcrLine:
    """Return the line in an image that is scaled by a factor."""
    a, b, c, d = ((x * factor, y * factor) for x, y in line.polygon)
    return OcrLine(line.text, (a, b, c, d), line.confidence)


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

    def find(self, image: Image) -> tuple[Polygon, ...]:
        """Return where lines are in an RGB image, as fast as the engine can. Raises ``OcrError``."""
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
                "Global.use_preprocess_img": False,  # images are scaled here, and lines are cut from the full size
                "Det.limit_type": "max",
                "Det.limit_side_len": 1 << 20,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
                "EngineConfig.onnxruntime.enable_cpu_mem_arena": True,  # a tenth faster
            }
        )

    def find(self, image: Image) -> tuple[Polygon, ...]:
        """Return where the image's lines are, at its size. Raises ``OcrError``."""
        with _failures_of("rapidocr"):
            return tuple(map(_as_polygon, self._detect(_as_bgr(image), 1.0)))

    def read(self, image: Image) -> tuple[OcrLine, ...]:
        """Return the image's lines. Raises ``OcrError``."""
        pixels_HWC = _as_bgr(_pad_strip(image))
        with _failures_of("rapidocr"):
            lines = [(box_42, *self._recognize(cut_line(pixels_HWC, box_42))) for box_42 in self._find(pixels_HWC)]
        return tuple(OcrLine(text.strip(), _as_polygon(box), score) for box, text, score in lines if text.strip())

    def _find(self, pixels_HWC: Pixels) -> Pixels:
        """Return boxes of lines, found in a scaled copy, and again in a larger one if the letters are small."""
        height, width = pixels_HWC.shape[:2]
        scale = min(_DETECTION_EDGE / min(height, width), max(1.0, _DETECTION_LONGEST / max(height, width)))
        boxes_N42 = self._detect(pixels_HWC, scale)
        if scale < 1 and len(boxes_N42) and line_height(boxes_N42) * scale < _SMALL_LINE:
            boxes_N42 = self._detect(pixels_HWC, min(1.0, 2 * scale))
        return boxes_N42

    def _detect(self, pixels_HWC: Pixels, scale: float) -> Pixels:
        found = self._reader(scale_pixels(pixels_HWC, scale), use_det=True, use_cls=False, use_rec=False)
        return np.zeros((0, 4, 2)) if found.boxes is None else np.asarray(found.boxes, np.float64) / scale

    def _recognize(self, line_HWC: Pixels) -> tuple[str, float]:
        """Read one line, and also upside down if the text is doubtful.

        The engine's own test of the direction turns every tenth short word of an upright page. Lines are read one by
        one because the model errs on the padding that batches need.
        """
        text, score = self._recognize_once(line_HWC)
        if score < _DOUBTFUL:
            turned, turned_score = self._recognize_once(np.ascontiguousarray(line_HWC[::-1, ::-1]))
            if turned_score > score + _CLEARLY:
                return turned, turned_score
        return text, score

    def _recognize_once(self, line_HWC: Pixels) -> tuple[str, float]:
        found = self._reader(line_HWC, use_det=False, use_cls=False, use_rec=True)
        return (found.txts[0], float(found.scores[0])) if found.txts else ("", 0.0)


@contextmanager
def _failures_of(engine: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise OcrError.at(engine, f"failed ({type(error).__name__}: {error})", "leave the image out") from error


def _as_bgr(image: Image) -> Pixels:
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


def _as_polygon(box_42: Pixels) -> Polygon:
    first, second, third, fourth = ((float(x), float(y)) for x, y in box_42)
    return first, second, third, fourth


def _pad_strip(image: Image) -> Image:
    """Pad a strip with white, because detection scales both sides to multiples of 32 pixels."""
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

    def find(self, image: Image) -> tuple[Polygon, ...]:
        """Return where the image's lines are, read in an image twice as large. Raises ``OcrError``."""
        larger = image.resize((image.width * 2, image.height * 2))
        return tuple(scale_line(line, 0.5).polygon for line in self.read(larger))

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
