"""An image before it is drawn, a pen that places text on it, and colours with enough contrast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, Literal, TypeAlias

from PIL import Image, ImageDraw

from llavar_peft.datagen.synth.font_faces import open_face
from llavar_peft.datagen.synth.vocabulary import Vocabulary

Colour: TypeAlias = tuple[int, int, int]
Quad: TypeAlias = tuple[tuple[float, float], tuple[float, float], tuple[float, float], tuple[float, float]]
Align: TypeAlias = Literal["left", "centre", "right"]

SMALLEST: Final = 9
"""Minimum font size in pixels."""
_MIN_CONTRAST: Final = 110


def draw_colours(rng: Random) -> tuple[Colour, Colour]:
    """Draw a background and an ink whose brightness differs by at least 110 of 255."""
    while True:
        background, ink = _draw_colour(rng), _draw_colour(rng)
        if rng.random() < 0.4:
            background, ink = rng.choice((((250, 250, 245), (20, 20, 24)), ((15, 18, 30), (245, 245, 240))))
        if abs(_luma(background) - _luma(ink)) >= _MIN_CONTRAST:
            return background, ink


def draw_paper(rng: Random) -> tuple[Colour, Colour]:
    """Draw an almost white background and a dark ink."""
    shade = rng.randint(232, 255)
    dark = rng.randint(10, 70)
    return (shade, shade, shade - rng.randint(0, 14)), (dark, dark, dark)


def _luma(colour: Colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _draw_colour(rng: Random) -> Colour:
    return rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)


@dataclass(frozen=True, slots=True)
class PlacedLine:
    """A line of text at its position in pixels, in a font whose file is ``face`` and whose em is ``size`` pixels.

    Attributes:
        block: Number of its paragraph.
    """

    text: str
    face: str
    size: int
    left: int
    baseline: int
    ink: Colour
    block: int

    def draw(self, image: Image.Image) -> Quad:
        """Draw the text and return the corners of its ink, clockwise from the top left, in pixels."""
        font = open_face(self.face, self.size)
        extent = [round(edge) for edge in font.getbbox(self.text, anchor="ls")]
        mask = Image.new("L", (extent[2] - extent[0], extent[3] - extent[1]))
        ImageDraw.Draw(mask).text((-extent[0], -extent[1]), self.text, 255, font, anchor="ls")
        x, y = self.left + extent[0], self.baseline + extent[1]
        image.paste(self.ink, (x, y), mask)
        left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)  # the extent also includes space before the ink
        return (x + left, y + top), (x + right, y + top), (x + right, y + bottom), (x + left, y + bottom)


@dataclass(frozen=True, slots=True)
class Shape:
    """An ornament; ``box`` is left, top, right, bottom in pixels, and ``thickness`` that of a line or frame."""

    kind: Literal["line", "frame", "area", "ellipse"]
    box: tuple[int, int, int, int]
    colour: Colour
    thickness: int = 1


@dataclass(kw_only=True)
class Scene:
    """Contents of an image: lines in reading order over ornaments, and questions about it with their answers.

    Attributes:
        fields: What a form states, by name, as printed; empty for other kinds.
    """

    width: int
    height: int
    paper: Colour
    lines: list[PlacedLine] = field(default_factory=list)
    shapes: list[Shape] = field(default_factory=list)
    questions: list[tuple[str, str]] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)

    def draw(self) -> tuple[Image.Image, list[Quad]]:
        """Return the RGB image and the corners of each line's ink."""
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
    """Writes lines below each other; ``gap`` begins a new paragraph.

    Attributes:
        rng: Source of all random choices.
        faces: Fonts to choose from.
        width: Width of the image in pixels.
        y: Top of the next line in pixels.
        block: Number of the current paragraph.
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
        """Leave space and begin a new paragraph."""
        self.y += pixels
        self.block += 1

    def fit(self, text: str, face: str, size: float, room: float) -> int:
        """Return the size, or a smaller one at which the text fits into a width; at least ``SMALLEST``."""
        wide = open_face(face, 100).getlength(text) / 100
        return max(SMALLEST, int(min(size, room / max(wide, 1e-6))))

    def write(self, text: str, face: str, size: int, left: float, right: float, align: Align = "left") -> None:
        """Write one line between two edges at ``y`` without advancing ``y``, so that others can be side by side."""
        slack = right - left - open_face(face, size).getlength(text)
        start = left + slack * {"left": 0.0, "centre": 0.5, "right": 1.0}[align]
        line = PlacedLine(text, face, size, round(start), round(self.y + 0.8 * size), self.ink, self.block)
        self.lines.append(line)

    def line(self, text: str, face: str, size: float, left: float, right: float, align: Align = "left") -> None:
        """Write one line, reduced in size if necessary, and advance to the next."""
        fitted = self.fit(text, face, size, right - left)
        self.write(text, face, fitted, left, right, align)
        self.y += 1.3 * fitted

    def wrapped(
        self, text: str, face: str, size: int, left: float, right: float, align: Align = "left", pitch: float = 1.3
    ) -> None:
        """Write a paragraph wrapped to the width; ``pitch`` is the line distance in multiples of the size."""
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
