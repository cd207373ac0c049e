"""The pages that the vision tower is trained on: random text at random positions, sizes, slants and colors."""

import string
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import TypeAlias

import numpy as np
import torch
from grid import SIDE, Line, centres, fill_cells
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from llavar_peft.datagen.synth.font_faces import CAP_HEIGHT, FONT_NAMES, open_face, packaged_face, text_width
from llavar_peft.datagen.synth.plain_style import (
    CAPITALS,
    DIGITS,
    FACES,
    LARGEST,
    SMALLEST_PITCH,
    SMALLEST_SIZE,
    draw_layout,
)
from llavar_peft.datagen.synth.scene import PlacedLine, Scene
from llavar_peft.datagen.synth.synth_settings import KINDS

Box: TypeAlias = tuple[float, float, float, float]
Page: TypeAlias = tuple[Image.Image, list[Line], Box]
"""Ink coverage of each pixel, the lines of text in cells, and the page's box in pixels; everything outside the box is
padding."""


@dataclass(frozen=True)
class Eye:
    """The form in which a tower gets a page.

    Args:
        cell: Side of a cell in pixels: that of the tower's patches.
        mean: Of the three colors, from 0 to 1.
        std: Of the three colors.
    """

    cell: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def pixels(self) -> int:
        """Side of the page in pixels."""
        return SIDE * self.cell

    @property
    def pad_colour(self) -> tuple[int, ...]:
        """The color around a page, as in LLaVA's pad mode."""
        return tuple(int(mean * 255) for mean in self.mean)


CLIP_EYE = Eye(10, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIGLIP_EYE = Eye(12, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def random_text(rng: Random) -> str:
    """Draw one word or number of the kinds found on signs, covers and receipts."""
    draw, length = rng.random(), rng.randint(1, 8)
    if draw < 0.42:
        return "".join(rng.choices(CAPITALS, k=length))
    if draw < 0.52:
        return "".join(rng.choices(string.ascii_uppercase, k=length))
    if draw < 0.62:
        return rng.choice(string.ascii_uppercase) + "".join(rng.choices(string.ascii_lowercase, k=length))
    if draw < 0.68:
        return "".join(rng.choices(string.ascii_lowercase, k=length))
    if draw < 0.80:
        return "".join(rng.choices(string.digits, k=rng.randint(1, 5)))
    if draw < 0.97:
        first, last = rng.randrange(10 ** rng.randint(1, 2)), rng.randrange(100)
        return f"{rng.choice(('', '', '', '', '$'))}{first:0{rng.randint(1, 2)}d}{rng.choice('......:::-/,')}{last:02d}"
    return "".join(rng.choices(string.ascii_letters + string.digits + string.punctuation, k=rng.randint(1, 6)))


def _font(rng: Random, size: int) -> ImageFont.FreeTypeFont:
    """Draw a packaged font, or sometimes Pillow's default one."""
    if rng.random() < 0.14:
        face = ImageFont.load_default(size)
        if isinstance(face, ImageFont.FreeTypeFont):
            return face
    return open_face(packaged_face(rng.choice(FONT_NAMES)), size)


def random_page(rng: Random, eye: Eye, layouts: float = 0.35) -> Page:
    """Draw white text on black: a sign, cover, poster or receipt with random words, or a page full of words.

    Args:
        rng: Of every choice.
        eye: Of the tower.
        layouts: Share of signs, covers, posters and receipts.
    """
    return layout_page(rng, eye) if rng.random() < layouts else dense_page(rng, eye)


def layout_page(rng: Random, eye: Eye) -> Page:
    """Draw one of the quickstart's layouts with other strings, some larger or with more items than there."""
    return page_of(draw_layout(rng.choice(KINDS["plain"]), rng, shortest=200, longest=400, most_items=2), eye)


def plain_layout_page(rng: Random, eye: Eye) -> Page:
    """Draw one of the quickstart's layouts with other strings, as large as there."""
    return page_of(draw_layout(rng.choice(KINDS["plain"]), rng, longest=320, largest=LARGEST), eye)


def page_of(layout: Scene, eye: Eye) -> Page:
    """Return a layout as a page."""
    side = max(layout.width, layout.height)
    left, top = (side - layout.width) // 2, (side - layout.height) // 2
    canvas = Image.new("L", (side, side))
    pen = ImageDraw.Draw(canvas)
    for line in layout.lines:
        pen.text((line.left + left, line.baseline + top), line.text, 255, open_face(line.face, line.size), anchor="ls")
    lines = [
        [(c, (x + left) / side * SIDE, (y + top) / side * SIDE) for c, x, y in centres(line)] for line in layout.lines
    ]
    scale = eye.pixels / side
    box = (left * scale, top * scale, (left + layout.width) * scale, (top + layout.height) * scale)
    return canvas.resize((eye.pixels, eye.pixels), Image.Resampling.BICUBIC), lines, box


def dense_page(rng: Random, eye: Eye) -> Page:
    """Fill a page with lines at random positions and sizes, sometimes narrowed, slanted, rotated or blurred."""
    over = rng.uniform(1.5, 2.6)
    unit = over * eye.pixels
    aspect = rng.uniform(0.5, 1.0) if rng.random() < 0.6 else 1.0
    width, height = (unit, unit * aspect) if rng.random() < 0.65 else (unit * aspect, unit)
    canvas = Image.new("L", (round(unit), round(unit)))
    pen = ImageDraw.Draw(canvas)
    left, top = (unit - width) / 2, (unit - height) / 2
    stretch, slant = (rng.uniform(0.84, 1.12), rng.uniform(-0.2, 0.2)) if rng.random() < 0.12 else (1.0, 0.0)
    turn = rng.uniform(-0.04, 0.04) if rng.random() < 0.06 else 0.0
    forward = np.array([[stretch, slant - turn], [turn, 1.0]])
    middle = np.array([unit / 2, unit / 2])
    lines: list[Line] = []
    y = top + rng.uniform(0, eye.cell) * over
    while True:
        text = " ".join(random_text(rng) for _ in range(4))
        face = _font(rng, 100)
        letters = "".join(c for c in text if c.isalnum()) or text
        pitch = face.getlength(letters) / len(letters) / 100 * stretch
        size = round(eye.cell * max(1.45, 0.98 / pitch) * over * rng.uniform(1.0, 2.4 if rng.random() < 0.15 else 1.3))
        y += size * rng.uniform(1.0, 1.25)
        if y > top + height:
            break
        face = face.font_variant(size=size)
        while face.getlength(text) > width * 0.97 and len(text) > 1:
            text = text[:-1].rstrip()
        x = round(left + rng.uniform(0.01, max(0.01, 1 - face.getlength(text) / width)) * width)
        pen.text((x, round(y)), text, 255, face, anchor="ls")
        ends = [x + face.getlength(text[:n]) for n in range(len(text) + 1)]
        centre = round(y) - CAP_HEIGHT * size / 2
        spots = [np.array([(start + end) / 2, centre]) for start, end in pairwise(ends)]
        moved = [(middle + forward @ (spot - middle)) / over / eye.cell for spot in spots]
        lines.append([(c, float(spot[0]), float(spot[1])) for c, spot in zip(text, moved, strict=True)])
    if (stretch, slant, turn) != (1.0, 0.0, 0.0):
        inverse = np.linalg.inv(forward)
        shift = middle - inverse @ middle
        data = (*inverse[0], shift[0], *inverse[1], shift[1])
        canvas = canvas.transform(canvas.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    canvas = canvas.resize((eye.pixels, eye.pixels), Image.Resampling.BICUBIC)
    if rng.random() < 0.12:
        canvas = canvas.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.6)))
    return canvas, lines, (left / over, top / over, (left + width) / over, (top + height) / over)


def plain_page(rng: Random, eye: Eye, layouts: float) -> Page:
    """Draw one of the quickstart's layouts, or fill a page with words in its fonts, sizes and characters.

    Args:
        rng: Of every choice.
        eye: Of the tower.
        layouts: Share of the quickstart's layouts.
    """
    if rng.random() < layouts:
        return plain_layout_page(rng, eye)
    side = rng.randint(192, 320)
    face, lines = packaged_face(rng.choice(FACES)), list[PlacedLine]()
    y = side * rng.uniform(0, 0.1)
    while True:
        words = "".join(rng.choice((*CAPITALS, *CAPITALS, *DIGITS, *"  OI.:")) for _ in range(12)).strip()
        least = side * max(SMALLEST_SIZE, SMALLEST_PITCH / (text_width(words, face) / len(words)))
        size = int(least * rng.choice((1.0, 1.1, 1.3, rng.uniform(1, LARGEST)))) + 1
        y += size * rng.uniform(0.9, 1.5)
        if y > side:
            break
        while size * text_width(words, face) > side * 0.97:
            words = words[:-1].rstrip()
        left = rng.uniform(0, side - size * text_width(words, face))
        lines.append(PlacedLine(words, face, size, round(left), round(y), (0, 0, 0), 0))
    return page_of(Scene(width=side, height=side, paper=(255, 255, 255), lines=lines, questions=[]), eye)


def letter_page(rng: Random, freedom: float, eye: Eye) -> Page:
    """Fill a page with rows of single letters, which are easier; at `freedom` 0 each is in the center of a cell.

    Args:
        rng: Of every choice.
        freedom: How far positions and sizes may deviate from the grid, from 0 to 1.
        eye: Of the tower.
    """
    over = rng.uniform(1.5, 2.5)
    unit = over * eye.cell
    canvas = Image.new("L", (round(unit * SIDE), round(unit * SIDE)))
    pen = ImageDraw.Draw(canvas)
    lines: list[Line] = []
    y = 0.5 + freedom * rng.uniform(-0.5, 0.5)
    while y < SIDE - 0.3:
        pitch = 1 + freedom * rng.uniform(0, 0.45)
        x = 0.5 + freedom * rng.uniform(-0.2, 0.8)
        size = rng.uniform(1.3, 1.4 + 0.6 * freedom)
        face = _font(rng, round(size * unit))
        text = "".join(random_text(rng) for _ in range(8))
        spots: Line = []
        for character in text:
            if x > SIDE - 0.3:
                break
            pen.text((x * unit, y * unit + CAP_HEIGHT * size * unit / 2), character, 255, face, anchor="ms")
            spots.append((character, x, y))
            x += max(pitch, face.getlength(character) / unit * 1.02)
        lines.append(spots)
        y += max(size * 0.95, 1.0 + freedom * rng.uniform(0, 0.8)) if freedom > 0.05 else rng.choice((1, 2))
    canvas = canvas.resize((eye.pixels, eye.pixels), Image.Resampling.BICUBIC)
    return canvas, lines, (0.0, 0.0, float(eye.pixels), float(eye.pixels))


def shift_page(
    mask: np.ndarray, lines: list[Line], box: Box, dx: int, dy: int, eye: Eye
) -> tuple[np.ndarray, list[Line], Box]:
    """Move a page with its text and box by a number of pixels."""
    moved, side = np.zeros_like(mask), eye.pixels
    target = slice(max(0, dy), side + min(0, dy)), slice(max(0, dx), side + min(0, dx))
    source = slice(max(0, -dy), side - max(0, dy)), slice(max(0, -dx), side - max(0, dx))
    moved[target] = mask[source]
    text = [[(c, x + dx / eye.cell, y + dy / eye.cell) for c, x, y in line] for line in lines]
    return moved, text, (box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy)


def targets(pages: list[list[Line]]) -> tuple[Tensor, Tensor]:
    """Return classes and shares of the pages' cells, each of shape (pages, `SIDE * SIDE`)."""
    filled = [fill_cells(lines) for lines in pages]
    return torch.tensor([classes for classes, _ in filled]), torch.tensor([shares for _, shares in filled])


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a background and an ink color with enough contrast."""
    luma = np.array([0.299, 0.587, 0.114])
    while True:
        back, ink = rng.uniform(0, 255, 3), rng.uniform(0, 255, 3)
        if rng.random() < 0.35:
            light, dark = np.full(3, rng.uniform(235, 255)), np.full(3, rng.uniform(0, 35))
            back, ink = (light, dark) if rng.random() < 0.5 else (dark, light)
        if abs((back - ink) @ luma) >= 95:
            return back, ink


def colour_page(mask: np.ndarray, box: Box, rng: np.random.Generator, eye: Eye, *, plain: bool = False) -> np.ndarray:
    """Color a page, pad it, and normalize it as the tower's image processor does.

    Args:
        mask: Ink coverage of each pixel, 0 to 255.
        box: The page's box; the rest is padding.
        rng: Of colors, noise and borders.
        eye: Of the tower.
        plain: Whether to use black on white.

    Returns:
        Pixels of shape (3, height, width).
    """
    back, ink = (np.full(3, 255.0), np.zeros(3)) if plain else _colours(rng)
    cover = mask[None].astype(np.float32) / 255
    page = back[:, None, None].astype(np.float32) * (1 - cover) + ink[:, None, None].astype(np.float32) * cover
    if rng.random() < 0.25:
        page += rng.uniform(0, 8) * rng.standard_normal(page.shape, dtype=np.float32)
    axis = np.arange(eye.pixels) + 0.5
    left, top, right, bottom = box
    inside = ((axis > top) & (axis < bottom))[:, None] & ((axis > left) & (axis < right))[None]
    if rng.random() < 0.2:
        core = (axis > top + 1.5) & (axis < bottom - 1.5), (axis > left + 1.5) & (axis < right - 1.5)
        page = np.where(inside & ~(core[0][:, None] & core[1][None]), ink[:, None, None], page)
    page = np.where(inside, page, np.array(eye.pad_colour)[:, None, None])
    page = np.clip(np.round(page), 0, 255) / 255
    return ((page - np.array(eye.mean)[:, None, None]) / np.array(eye.std)[:, None, None]).astype(np.float32)
