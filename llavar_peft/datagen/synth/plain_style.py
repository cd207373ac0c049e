"""The plain style: few large letters on flat colours, which 12 x 12 patches can resolve. The quickstart's images.

Every string that a question asks for is random, so that a model cannot answer without reading the image. Random strings
omit O, I and Q, which resemble 0 and 1. The layout is free except for legibility: the letters of a line are on average
at least ``SMALLEST_PITCH`` of the image's longer side apart.

The packaged tiny models were trained on these images: the image of a kind, a seed and a number must not change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any, Final, TypeAlias

from llavar_peft.datagen.synth.font_faces import packaged_face, text_width
from llavar_peft.datagen.synth.scene import Colour, PlacedLine, Scene, Shape, draw_colours
from llavar_peft.datagen.synth.synth_settings import LEAST_PLAIN, SynthKind
from llavar_peft.datagen.synth.vocabulary import draw_number, draw_price

CAPITALS: Final = "ABCDEFGHJKLMNPRSTUVWXYZ"
DIGITS: Final = "0123456789"
FACES: Final = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold")
ITEMS: Final = (
    "tea", "milk", "soup", "cake", "rice", "bread", "pizza", "salad", "juice", "fish", "egg", "apple", "beans"
)  # fmt: skip

SMALLEST_PITCH: Final = 0.085
"""Minimum average distance of neighbouring letters as a fraction of the longer side: 10.2 of 120 pixels."""

SMALLEST_SIZE: Final = 0.125
"""Minimum font size as a fraction of the longer side: 15 of 120 pixels."""

LARGEST: Final = 1.8
"""Maximum size as a multiple of the minimum: what a vision tower that attends to 3 x 3 patches can recognize."""

_BLACK: Final[Colour] = (0, 0, 0)
_WHITE: Final[Colour] = (255, 255, 255)


def draw_plain(kind: SynthKind, rng: Random, longest: int) -> Scene:
    """Return the scene of an image, in colour.

    Args:
        rng: Source of all random choices.
        longest: Maximum length of the longer side in pixels.
    """
    scene = draw_layout(kind, rng, longest=longest, largest=LARGEST)
    scene.paper, ink = draw_colours(rng)
    scene.lines = [replace(line, ink=ink) for line in scene.lines]
    if rng.random() < 0.3:
        thickness = max(1, round(max(scene.width, scene.height) * 0.008))
        scene.shapes.append(Shape("frame", (0, 0, scene.width - 1, scene.height - 1), ink, thickness))
    return scene


def draw_layout(
    kind: SynthKind,
    rng: Random,
    *,
    shortest: int = LEAST_PLAIN,
    longest: int = 448,
    largest: float = 2.6,
    most_items: int = 1,
) -> Scene:
    """Return the text, questions and layout of an image, in black on white.

    Args:
        rng: Source of all random choices.
        shortest: Minimum length of the longer side in pixels.
        longest: Maximum length of the longer side in pixels.
        largest: Maximum size of a single word as a multiple of the smallest legible size.
        most_items: Maximum number of items on a receipt, not counting its total.
    """
    while True:
        rows, questions, *rest = _receipt(rng, most_items) if kind == "receipts" else _CONTENT[kind](rng)
        fields: dict[str, Any] = rest[0] if rest else {}
        long_side, aspect = rng.randint(shortest, longest), rng.uniform(0.7, 1.0)
        wide = rng.random() < 0.6
        width, height = (long_side, round(long_side * aspect)) if wide else (round(long_side * aspect), long_side)
        lines = _place(rng, rows, packaged_face(rng.choice(FACES)), width, height, largest=largest)
        if lines is not None:
            return Scene(width=width, height=height, paper=_WHITE, lines=lines, questions=questions, fields=fields)


def _word(rng: Random, low: int, high: int) -> str:
    return "".join(rng.choices(CAPITALS, k=rng.randint(low, high)))


_Content: TypeAlias = tuple[list[str], list[tuple[str, str]]]
_Form: TypeAlias = tuple[list[str], list[tuple[str, str]], dict[str, Any]]


def _sign(rng: Random) -> _Content:
    words = [_word(rng, 3, 7) for _ in range(rng.choice((1, 1, 2)))]
    lines = list(words)
    questions = [(rng.choice(("What does the sign say?", "Which words are on the sign?")), " ".join(words))]
    if rng.random() < 0.6:
        number = draw_number(rng, rng.randint(2, 4))
        lines.append(number)
        questions.append(("Which number is on the sign?", number))
    return lines, questions


def _cover(rng: Random) -> _Content:
    words = [_word(rng, 3, 7) for _ in range(rng.choice((1, 2)))]
    author = _word(rng, 4, 7)
    questions = [
        (rng.choice(("What is the title of this book?", "What is the book called?")), " ".join(words)),
        (rng.choice(("Who wrote this book?", "Who is the author?")), author),
    ]
    return [*words, f"BY {author}"], questions


def _poster(rng: Random) -> _Content:
    name = _word(rng, 4, 7)
    date = f"{rng.randint(1, 28):02d}.{rng.randint(1, 12):02d}"
    hour = f"{rng.randint(10, 23)}:{rng.choice(DIGITS[:6])}{rng.choice(DIGITS)}"
    questions = [
        (rng.choice(("Who is playing?", "What is the name on the poster?")), name),
        ("On which date is the show?", date),
        ("At what time does the show start?", hour),
    ]
    return [name, f"ON {date}", f"AT {hour}"], questions


def _receipt(rng: Random, most_items: int = 1) -> _Form:
    shop = _word(rng, 4, 7)
    items = rng.sample(ITEMS, rng.randint(1, most_items))
    prices = [draw_price(rng, rng.randint(1, 1)) for _ in items]  # randint(1, 1) advances the generator
    total = draw_price(rng, rng.randint(1, 2))
    questions = [
        (rng.choice(("What is the name of the shop?", "Which shop is this receipt from?")), shop),
        (rng.choice(("What is the total?", "How much was paid in total?")), total),
        *((f"How much is the {item}?", price) for item, price in zip(items, prices, strict=True)),
    ]
    rows = [f"{item.upper()}\t{price}" for item, price in zip(items, prices, strict=True)]
    lines = [{"name": item.upper(), "price": price} for item, price in zip(items, prices, strict=True)]
    return [shop, *rows, f"TOTAL\t{total}"], questions, {"shop": shop, "items": lines, "total": total}


def _invoice(rng: Random) -> _Form:
    seller, number = _word(rng, 4, 7), draw_number(rng, 4)
    date = f"{rng.randint(1, 28):02d}.{rng.randint(1, 12):02d}.{rng.randint(10, 29)}"
    total = draw_price(rng, rng.randint(1, 2))
    questions = [("Who sent the invoice?", seller), ("What is the total?", total), ("What is the date?", date)]
    fields = {"seller": seller, "number": number, "date": date, "total": total}
    return [seller, f"NO {number}", date, f"TOTAL\t{total}"], questions, fields


_CONTENT: Final[dict[SynthKind, Callable[[Random], _Content | _Form]]] = {
    "signs": _sign,
    "covers": _cover,
    "posters": _poster,
    "receipts": _receipt,
    "invoices": _invoice,
}


def _smallest(text: str, face: str, long_side: int) -> float:
    """Return the smallest font size at which a line is legible, in pixels."""
    letters = "".join(character for character in text if character.isalnum())
    pitch = text_width(letters, face) / len(letters)
    return long_side * max(SMALLEST_SIZE, SMALLEST_PITCH / pitch)


def _place(
    rng: Random, rows: list[str], face: str, width: int, height: int, *, largest: float
) -> list[PlacedLine] | None:
    """Return one layout, None if it does not fit."""
    long_side, margin = max(width, height), 0.02 * max(width, height)
    room = width - 2 * margin
    sizes: list[int] = []
    for row in rows:
        flat = row.replace("\t", "  ")
        low, high = _smallest(flat, face, long_side), room / text_width(flat, face)
        if high < low:
            return None
        expected = low * rng.uniform(1.0, 1.25 if "\t" in row or " " in row else largest)
        sizes.append(int(min(high, expected)) + 1)
    spacing = rng.uniform(1.12, 1.6)
    tall = sum(sizes) * spacing
    if tall > height - 2 * margin:
        least = [int(_smallest(row.replace("\t", "  "), face, long_side)) + 1 for row in rows]
        sizes = [max(low, int(size * 0.7)) for low, size in zip(least, sizes, strict=True)]
        spacing = 1.15
        tall = sum(sizes) * spacing
    if tall > height - 2 * margin:
        return None
    return _stack(rng, rows, sizes, face, spacing, (margin, width - margin, height - margin - tall))


def _stack(
    rng: Random, rows: list[str], sizes: list[int], face: str, spacing: float, area: tuple[float, float, float]
) -> list[PlacedLine] | None:
    """Stack the rows at a random height; ``area`` is left, right and the free height."""
    left, right, free = area
    widths = [text_width(row.replace("\t", "  "), face) * size for row, size in zip(rows, sizes, strict=True)]
    if max(widths) > right - left:
        return None
    style = rng.choice(("left", "centre", "free"))
    span = rng.uniform(max(widths), right - left)
    start = rng.uniform(left, right - span)
    top, lines = rng.uniform(left, max(left, free)), list[PlacedLine]()
    for row, size, width in zip(rows, sizes, widths, strict=True):
        top += size * spacing
        slack = (span - width) * {"left": 0.0, "centre": 0.5, "free": rng.random()}[style]
        baseline = round(top - size * (spacing - 0.9))
        label, _, value = row.partition("\t")
        if not value:
            lines.append(PlacedLine(row, face, size, round(start + slack), baseline, _BLACK, 0))
            continue
        lines.append(PlacedLine(label, face, size, round(start), baseline, _BLACK, 0))
        value_left = start + span - text_width(value, face) * size
        lines.append(PlacedLine(value, face, size, round(value_left), baseline, _BLACK, 0))
    return lines
