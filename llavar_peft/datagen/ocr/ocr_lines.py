"""What every OCR engine gives: lines with their places. The rest of this package knows no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

if TYPE_CHECKING:
    from PIL.Image import Image

Point: TypeAlias = tuple[float, float]
EngineName: TypeAlias = Literal["rapidocr", "tesseract"]


@dataclass(frozen=True, slots=True)
class OcrLine:
    """A run of text that an engine saw in one piece.

    Attributes:
        text: What it says, without white space at its ends.
        polygon: Its four corners in pixels, clockwise as one reads, from the top left of the text.
        confidence: The engine's own, 0 to 1.
    """

    text: str
    polygon: tuple[Point, Point, Point, Point]
    confidence: float

    def as_json(self) -> list[Any]:
        """The line for a journal: text, eight coordinates to a tenth of a pixel, confidence."""
        return [self.text, [round(value, 1) for point in self.polygon for value in point], round(self.confidence, 4)]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> OcrLine:
        """The line from ``as_json``'s form. Raises ``ValueError`` or ``TypeError`` on another one."""
        text, flat, confidence = value
        points = [(float(x), float(y)) for x, y in zip(flat[::2], flat[1::2], strict=True)]
        first, second, third, fourth = points
        return cls(str(text), (first, second, third, fourth), float(confidence))


class OcrEngine(Protocol):
    """Reads images. One instance serves one process, one image after another."""

    @property
    def name(self) -> EngineName:
        """Which one it is."""
        ...

    @property
    def version(self) -> str:
        """Of the engine and what it reads with; another version may read otherwise."""
        ...

    def read(self, image: Image) -> tuple[OcrLine, ...]:
        """Return an RGB image's lines, in any order; none where it sees no text. Raises ``OcrError``."""
        ...


def letter_count(text: str) -> int:
    """Number of letters and digits."""
    return sum(character.isalnum() for character in text)
