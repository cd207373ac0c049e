"""What OCR engines read, and what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from llavar_peft.errors import LlavarError

if TYPE_CHECKING:
    from PIL.Image import Image

Point: TypeAlias = tuple[float, float]
Polygon: TypeAlias = tuple[Point, Point, Point, Point]
EngineName: TypeAlias = Literal["rapidocr", "tesseract"]


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
