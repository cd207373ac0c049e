"""Pages for ``small_print.py``: sheets with small letters, words of some letters, and till receipts."""

import dataclasses
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from llavar_peft.atomic_files import write_json
from llavar_peft.data.letter_canvas import PADDING
from llavar_peft.datagen.synth.font_faces import packaged_face, text_width
from llavar_peft.datagen.synth.plain_style import CAPITALS, FACES, ITEMS, draw_layout
from llavar_peft.datagen.synth.scene import PlacedLine, Scene, draw_colours, draw_paper
from llavar_peft.datagen.synth.synth_settings import KINDS
from llavar_peft.datagen.synth.vocabulary import draw_price

SIDE = 120
"""Side of the vision tower's input in pixels."""
SHEET = 480
"""Side of a sheet in pixels, so that up to 4 x 4 tiles see all of its detail."""
FULL_SIZE = 11.0
"""Height in pixels of the capitals of a scene that fills the plain model's view: the smallest that it can read."""
CAPITAL = 0.73
"""Height of a capital as a fraction of the font size."""
LONGEST_ANSWER = 5
"""Most characters of an answer about a sheet."""
DPI, RECEIPT_WIDTH_MM, POINTS = 150, 58.0, 10.0

Drawn = tuple[Image.Image, list[tuple[str, str]]]


def draw_sheet(
    rng: Random, number: int, height: float, tiles: int = 2
) -> tuple[Image.Image, list[tuple[str, str]], set[str]]:
    """Draw a scene of the quickstart at a random place of a sheet, with letters of a height in the plain view.

    Args:
        rng: Source of all random choices.
        number: Number of the sheet, which decides on its kind.
        height: Height of a capital in pixels of the plain model's view.
        tiles: Number of tiles along each side of the sheet.

    Returns:
        The sheet, the questions about it, and those answers of which an edge between tiles cuts a letter.
    """
    kinds = KINDS["plain"]
    longest = round(SHEET * height / FULL_SIZE)
    while True:
        scene = draw_layout(kinds[number % len(kinds)], rng, shortest=longest, longest=longest, largest=1.25)
        if not all(is_easy(answer) for _, answer in scene.questions):
            continue
        scene.paper, ink = draw_colours(rng)
        scene.lines = [dataclasses.replace(line, ink=ink) for line in scene.lines]
        image, quads = scene.draw()
        corners, margin = [corner for quad in quads for corner in quad], longest // 50
        edges = [(min(axis) - margin, max(axis) + margin) for axis in zip(*corners, strict=True)]
        left = top = 0
        if longest > SHEET or rng.random() < 0.5:  # the text alone
            (left, right), (top, bottom) = ((max(low, 0), high) for low, high in edges)
            image = image.crop((left, top, min(right, image.width), min(bottom, image.height)))
        if max(image.size) <= SHEET:
            break
    sheet = Image.new("RGB", (SHEET, SHEET), scene.paper if rng.random() < 0.5 else PADDING)
    place = rng.randint(0, SHEET - image.width), rng.randint(0, SHEET - image.height)
    sheet.paste(image, place)
    moved = [
        dataclasses.replace(line, left=line.left - left + place[0], baseline=line.baseline - top + place[1])
        for line in scene.lines
    ]
    cut = {answer for _, answer in scene.questions if any(is_cut(line, answer, tiles) for line in moved)}
    return sheet, scene.questions, cut


def is_cut(line: PlacedLine, text: str, tiles: int) -> bool:
    """Return whether an edge between tiles runs through a letter of a text in a line of a sheet."""
    before, found, _ = line.text.partition(text)
    if not found:
        return False
    letters = [before + found[:number] for number in range(len(found) + 1)]
    sides = [line.left + line.size * text_width(part, line.face) for part in letters]
    top = line.baseline - CAPITAL * line.size
    return any(
        top < edge < line.baseline or any(one < edge < other for one, other in pairwise(sides))
        for edge in (SHEET * number / tiles for number in range(1, tiles))
    )


def draw_sheet_between(rng: Random, number: int, low: float, high: float) -> Drawn:
    """Draw a sheet whose letters have a height between two, small heights as often as great ones."""
    image, questions, _ = draw_sheet(rng, number, low * (high / low) ** rng.random())
    return image, questions


def draw_height(rng: Random, low: float, high: float) -> float:
    """Draw a height between two, which can be equal."""
    return low if low == high else rng.uniform(low, high)


def draw_unseen(rng: Random, number: int, *, low: float, high: float, tiles: int = 2, cut: bool = False) -> Drawn:
    """Draw a sheet with those questions alone whose answer an edge between tiles cuts, or does not cut."""
    height = draw_height(rng, low, high)
    while True:
        image, questions, answers = draw_sheet(rng, number, height, tiles)
        chosen = [(question, answer) for question, answer in questions if (answer in answers) == cut]
        if chosen:
            return image, chosen


def draw_word(rng: Random, _: int, *, low: float, high: float, fewest: int, most: int) -> Drawn:
    """Draw a sheet with one word of some letters, none of which follows itself."""
    size = round(draw_height(rng, low, high) * SHEET / SIDE / CAPITAL)
    face = packaged_face(rng.choice(FACES))
    while True:
        word = "".join(rng.choices(CAPITALS, k=rng.randint(fewest, most)))
        room = SHEET - math.ceil(size * text_width(word, face))
        if is_easy(word) and room >= 0:
            break
    paper, ink = draw_colours(rng)
    line = PlacedLine(word, face, size, rng.randint(0, room), rng.randint(size, SHEET - size // 3), ink, 0)
    scene = Scene(width=SHEET, height=SHEET, paper=paper, lines=[line])
    return scene.draw()[0], [("What does the sign say?", word)]


def is_easy(answer: str) -> bool:
    """Return whether an answer is short and has no character twice in a row."""
    return len(answer) <= LONGEST_ANSWER and all(one != other for one, other in pairwise(answer))


def draw_receipt(rng: Random) -> Drawn:
    """Draw a till receipt as a scanner of 150 dpi sees it."""
    width, size = round(RECEIPT_WIDTH_MM / 25.4 * DPI), round(POINTS / 72 * DPI)
    face, shop = packaged_face(rng.choice(FACES)), "".join(rng.choices(CAPITALS, k=rng.randint(4, 7)))
    bought = [(item, draw_price(rng, 1)) for item in rng.sample(ITEMS, rng.randint(2, 5))]
    total = draw_price(rng, rng.randint(1, 2))
    paper, ink = draw_paper(rng)
    margin, pitch, y = rng.randint(12, 40), rng.uniform(1.2, 1.6) * size, rng.uniform(10, 40) + size
    heading = margin + (width - 2 * margin - text_width(shop, face) * size) * rng.random()
    lines = [PlacedLine(shop, face, size, round(heading), round(y), ink, 0)]
    for number, (label, value) in enumerate([*bought, ("total", total)], start=1):
        y += pitch * (1.6 if number in (1, len(bought) + 1) and rng.random() < 0.6 else 1.0)
        end = width - margin - text_width(value, face) * size
        lines += [
            PlacedLine(text, face, size, round(left), round(y), ink, number)
            for text, left in ((label.upper(), margin), (value, end))
        ]
    scene = Scene(width=width, height=round(y + rng.uniform(12, 60)), paper=paper, lines=lines)
    asked = [
        (rng.choice(("What is the name of the shop?", "Which shop is this receipt from?")), shop),
        (rng.choice(("What is the total?", "How much was paid in total?")), total),
        *((f"How much is the {item}?", price) for item, price in bought),
    ]
    return scene.draw()[0], asked


def write_pages(folder: Path, count: int, seed: str, draw: Callable[[Random, int], Drawn]) -> list[dict[str, Any]]:
    """Write images with a conversation about each, unless they exist, and return the records."""
    path = folder / "records.json"
    if not path.is_file():
        (folder / "images").mkdir(parents=True, exist_ok=True)
        records = []
        for number in range(count):
            rng = Random(f"{seed}/{number}")
            image, questions = draw(rng, number)
            image.save(folder / "images" / f"{number:05d}.png", compress_level=1)
            turns: list[dict[str, str]] = []
            for question, answer in rng.sample(questions, len(questions)):
                asked = question if turns else f"<image>\n{question}"
                turns += [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
            records.append({"id": str(number), "image": f"{number:05d}.png", "conversations": turns})
        write_json(path, records)
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return found
