"""An image before it is drawn, and a pen that places text on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final, Literal, TypeAlias

from PIL import Image, ImageDraw

from llavar_peft.datagen.synth.font_faces import open_face
from llavar_peft.datagen.synth.text_colours import Colour
from llavar_peft.datagen.synth.vocabulary import Vocabulary

Quad: TypeAlias = tuple[tuple[float, float], tuple[float, float], tuple[float, float], tuple[float, float]]
Align: TypeAlias = Literal["left", "centre", "right"]

SMALLEST: Final = 9
"""Font size in pixels below which nothing is written."""


@dataclass(frozen=True, slots=True)
class PlacedLine:
    """A line of text with its place.

    Attributes:
        text: What it says.
        face: The font's file.
        size: Em in pixels.
        left: Where the pen starts, in pixels.
        baseline: In pixels from the top.
        ink: Its colour.
        block: Number of the paragraph that it belongs to.
    """

    text: str
    face: str
    size: int
    left: int
    baseline: int
    ink: Colour
    block: int

    def draw(self, image: Image.Image) -> Quad:
        """Write the text and returns the corners of its ink, clockwise from the top left, in pixels."""
        # As ImageDraw.text does it, which keeps the mask to itself; the font's getbbox counts the space before the ink.
        mask, offset = open_face(self.face, self.size).getmask2(self.text, "L", anchor="ls")
        x, y = self.left + offset[0], self.baseline + offset[1]
        image.im.paste(self.ink, (x, y, x + mask.size[0], y + mask.size[1]), mask)
        left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
        return (x + left, y + top), (x + right, y + top), (x + right, y + bottom), (x + left, y + bottom)


@dataclass(frozen=True, slots=True)
class Shape:
    """An ornament: a line, a frame or a filled area.

    Attributes:
        kind: Which.
        box: Left, top, right, bottom in pixels.
        colour: Of it.
        thickness: Of a line or frame, in pixels.
    """

    kind: Literal["line", "frame", "area", "ellipse"]
    box: tuple[int, int, int, int]
    colour: Colour
    thickness: int = 1


@dataclass(kw_only=True)
class Scene:
    """What stands where.

    Attributes:
        width: Pixels.
        height: Pixels.
        paper: The background's colour.
        lines: The text, in reading order.
        shapes: Ornaments, under the text.
        questions: What may be asked, with the answers.
    """

    width: int
    height: int
    paper: Colour
    lines: list[PlacedLine] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    questions: list[tuple[str, str]] = field(default_factory=list)

    def draw(self) -> tuple[Image.Image, list[Quad]]:
        """Return the image, RGB, and where each line's ink is."""
        image = Image.new("RGB", (self.width, self.height), self.paper)
        canvas = ImageDraw.Draw(image)
        for shape in self.shapes:
            if shape.kind == "line":
                canvas.line(shape.box, shape.colour, shape.thickness)
            elif shape.kind == "frame":
                canvas.rectangle(shape.box, outline=shape.colour, width=shape.thickness)
            elif shape.kind == "area":
                canvas.rectangle(shape.box, fill=shape.colour)
            else:
                canvas.ellipse(shape.box, fill=shape.colour)
        return image, [line.draw(image) for line in self.lines]


@dataclass
class Pen:
    """Writes lines below each other; a new paragraph begins with ``gap``.

    Attributes:
        rng: Where all choices come from.
        words: The language's.
        faces: Fonts to choose from.
        width: Of the image, in pixels.
        ink: Colour.
        y: Where the next line's top is, in pixels.
        block: Number of the paragraph.
        lines: What was written.
    """

    rng: Random
    words: Vocabulary
    faces: Sequence[str]
    width: int
    ink: Colour = (20, 20, 24)
    y: float = 0.0
    block: int = 0
    lines: list[PlacedLine] = field(default_factory=list)

    def gap(self, pixels: float) -> None:
        """Leaves space and begins a new paragraph."""
        self.y += pixels
        self.block += 1

    def fit(self, text: str, face: str, size: float, room: float) -> int:
        """The size, or a smaller one at which a text fits into a width; at least ``SMALLEST``."""
        wide = open_face(face, 100).getlength(text) / 100
        return max(SMALLEST, int(min(size, room / max(wide, 1e-6))))

    def write(self, text: str, face: str, size: int, left: float, right: float, align: Align = "left") -> None:
        """Write one line between two edges at ``y``; ``y`` stays, so that others can stand beside it."""
        slack = right - left - open_face(face, size).getlength(text)
        start = left + slack * {"left": 0.0, "centre": 0.5, "right": 1.0}[align]
        line = PlacedLine(text, face, size, round(start), round(self.y + 0.8 * size), self.ink, self.block)
        self.lines.append(line)

    def line(self, text: str, face: str, size: float, left: float, right: float, align: Align = "left") -> None:
        """Write one line, smaller if need be, and goes on to the next."""
        fitted = self.fit(text, face, size, right - left)
        self.write(text, face, fitted, left, right, align)
        self.y += 1.3 * fitted

    def wrapped(
        self, text: str, face: str, size: int, left: float, right: float, align: Align = "left", pitch: float = 1.3
    ) -> None:
        """Write a paragraph, broken where the width ends; ``pitch`` is the distance of lines in sizes."""
        font, row = open_face(face, size), ""
        for word in text.split():
            longer = f"{row} {word}".strip()
            if row and font.getlength(longer) > right - left:
                self.write(row, face, size, left, right, align)
                self.y += pitch * size
                row = word
            else:
                row = longer
        self.write(row, face, size, left, right, align)
        self.y += pitch * size
