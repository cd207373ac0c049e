"""OCR engines: RapidOCR, whose models come with its package, and Tesseract, a program of the system.

Both run offline in a single thread: images are read in parallel by several processes.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from llavar_peft.datagen.ocr.ocr_lines import EngineName, OcrEngine, OcrError, OcrLine, Polygon
from llavar_peft.datagen.ocr.tesseract_engine import Tesseract
from llavar_peft.datagen.ocr.text_regions import Pixels, cut_line, line_height, scale_pixels
from llavar_peft.errors import MissingDependencyError

if TYPE_CHECKING:
    from PIL.Image import Image

_MAX_ASPECT: Final = 6  # ratio of the sides of an image given to RapidOCR
_DETECTION_EDGE: Final = 736  # pixels of the shorter side in which RapidOCR looks for lines, its own default
_DETECTION_LONGEST: Final = 2000  # pixels of the longer side to which an image is enlarged for that
_SMALL_LINE: Final = 14.0  # pixels of a line's box there, below which it looks again in an image twice as large
_DOUBTFUL: Final = 0.85  # confidence below which RapidOCR reads a line upside down too
_CLEARLY: Final = 0.1  # by how much more confident it then has to be
_LINE_SHAPE: Final = [3, 48, 48]  # RapidOCR pads a line to this width at least; its default of 320 is work for nothing
_IDENTITY_MODEL: Final = (  # an ONNX model of one operation, y = Identity(x)
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x02\x10\r"
)


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
                "Rec.rec_img_shape": _LINE_SHAPE,
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
        scaled_HWC = scale_pixels(pixels_HWC, scale)
        with _flushed_denormals():
            found = self._reader(scaled_HWC, use_det=True, use_cls=False, use_rec=False)
        return np.zeros((0, 4, 2)) if found.boxes is None else np.asarray(found.boxes, np.float64) / scale

    def _recognize(self, line_HWC: Pixels) -> tuple[str, float]:
        """Read one line, and also upside down if the text is doubtful.

        The engine's own test of the direction turns every tenth short word of an upright page. Lines are read one by
        one because the model errs on the padding that batches need, and a batch takes no less time for each line.
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
def _flushed_denormals() -> Iterator[None]:
    """Let this thread compute with 0 instead of denormal numbers.

    The detection model has activations that fade to denormal numbers, with which processors compute a hundred times
    slower. Where torch is loaded, it sets the thread's mode, which ends with the block. Elsewhere ONNX Runtime sets it
    for good, if its first session in the process asks for it: RapidOCR, which makes the others, lacks the option.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        _ask_for_flushing()
        yield
        return
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@cache
def _ask_for_flushing() -> None:
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    InferenceSession(_IDENTITY_MODEL, options, providers=["CPUExecutionProvider"])


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
