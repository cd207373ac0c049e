"""How small can letters be before a model no longer reads them, with and without more resolution?

The tiny parts of the quickstart, whose vision tower sees 120 x 120 pixels, first learn to read large letters: this is the
quickstart. The resulting model is then tuned once for each resolution, on the same images in the same order. In all
records and questions, the image stands first.

``letters`` compares models on sheets whose letters are 4.5 to 12 pixels high in the plain model's view, and writes the
curves to ``letters.heights.json`` and ``letters.heights.html``. The answers have at most five characters, and no
character follows itself: the tiny tower reads too few letters correctly for longer ones to be right in 90 % of the cases,
and repeated letters are its most frequent mistake. An edge between tiles cuts letters in two. Such answers are trained
on, but asked for apart: ``letters.cut.json``.

``receipts`` tunes the models on till receipts, 58 mm wide, in 10-point letters at 150 dpi, and asks for one field of
unseen ones. These have longer answers, repeated letters, and letters that edges cut.

    python examples/small_print.py letters --out runs/small_print
    python examples/small_print.py receipts --out runs/small_print
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from llavar_peft import CrossAttention, DataConfig, ModelConfig, Tiles, load_chat
from llavar_peft.atomic_files import write_json
from llavar_peft.data.letter_canvas import PADDING
from llavar_peft.datagen.synth.font_faces import packaged_face, text_width
from llavar_peft.datagen.synth.plain_style import CAPITALS, FACES, ITEMS, draw_layout
from llavar_peft.datagen.synth.scene import PlacedLine, Scene, draw_colours, draw_paper
from llavar_peft.datagen.synth.synth_settings import KINDS
from llavar_peft.datagen.synth.vocabulary import draw_price
from llavar_peft.evaluation.heights.height_results import (
    HeightCurve,
    HeightPoint,
    HeightResults,
    read_height_results,
    write_height_results,
)
from llavar_peft.evaluation.heights.heights_view import view_heights
from llavar_peft.evaluation.vqa.scored_results import Setting
from llavar_peft.page.heights_page import write_heights_page
from llavar_peft.page.run_figures import wilson
from llavar_peft.recipe.presets import load_recipe
from llavar_peft.training.quickstart import run_quickstart, score
from llavar_peft.training.trainer import run_recipe

SIDE = 120
"""Side of the vision tower's input in pixels."""
SHEET = 480
"""Side of a sheet in pixels, so that up to 4 x 4 tiles see all of its detail."""
FULL_SIZE = 11.0
"""Height in pixels of the capitals of a scene that fills the plain model's view: the smallest that it can read."""
SMALLEST, LARGEST = 4.5, 12.0
"""Range of the heights of letters in training, in pixels of the plain model's view."""
HEIGHTS = (4.5, 5.0, 5.5, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0)
"""Heights at which the models are compared: four small ones, and twice these."""
CUT_HEIGHTS = (6.0, 9.0)
"""Heights of letters that an edge between tiles cuts: read in tiles, and not in the plain view."""
CAPITAL = 0.73
"""Height of a capital as a fraction of the font size."""
LONGEST_ANSWER = 5
"""Most characters of an answer about a sheet."""
RESOLUTIONS: dict[str, Tiles | CrossAttention | None] = {
    "plain": None,
    "tiles-2x2": Tiles(grid=((2, 2),)),
    "cross-attention-2": CrossAttention(grid=2),
    "cross-attention-4": CrossAttention(grid=4),
}
RECEIPT_TILES = Tiles(grid=((2, 3), (3, 3), (4, 3)))
DPI, RECEIPT_WIDTH_MM, POINTS = 150, 58.0, 10.0

Drawn = tuple[Image.Image, list[tuple[str, str]]]


def draw_sheet(rng: Random, number: int, height: float) -> tuple[Image.Image, list[tuple[str, str]], set[str]]:
    """Draw a scene of the quickstart at a random place of a sheet, with letters of a height in the plain view.

    Returns:
        The sheet, the questions about it, and those answers of which an edge between 2 x 2 tiles cuts a letter.
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
    cut = {answer for _, answer in scene.questions if any(is_cut(line, answer) for line in moved)}
    return sheet, scene.questions, cut


def is_cut(line: PlacedLine, text: str) -> bool:
    """Return whether an edge between 2 x 2 tiles runs through a letter of a text in a line of a sheet."""
    before, found, _ = line.text.partition(text)
    letters = [before + found[:number] for number in range(len(found) + 1)]
    sides = [line.left + line.size * text_width(part, line.face) for part in letters]
    across = any(one < SHEET / 2 < other for one, other in pairwise(sides))
    return bool(found) and (across or line.baseline - CAPITAL * line.size < SHEET / 2 < line.baseline)


def draw_unseen(rng: Random, number: int, height: float, *, cut: bool = False) -> Drawn:
    """Draw a sheet with those questions alone whose answer an edge between tiles cuts, or does not cut."""
    while True:
        image, questions, answers = draw_sheet(rng, number, height)
        chosen = [(question, answer) for question, answer in questions if (answer in answers) == cut]
        if chosen:
            return image, chosen


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


def tune(start: Path, data: Path, resolution: Tiles | CrossAttention | None, out: Path) -> Path:
    """Tune a model on pages with a resolution, by the second stage of the quickstart's recipe."""
    preset = load_recipe("tiny")
    config = DataConfig(records=str(data / "records.json"), images=str(data / "images"), holdout=0, workers=0)
    faster = 5e-3 if isinstance(resolution, CrossAttention) else None  # for modules that are not pretrained
    stage = dataclasses.replace(
        preset.stages[1],
        data=config,
        max_length=2048,
        optim=dataclasses.replace(preset.stages[1].optim, projector_learning_rate=faster),
    )
    model = ModelConfig(checkpoint=str(start), dtype="float32", resolution=resolution)
    began, before = time.perf_counter(), time.process_time()
    made = run_recipe(dataclasses.replace(preset, model=model, stages=(stage,), output_dir=str(out)))
    seconds, of_cpu = time.perf_counter() - began, time.process_time() - before
    print(f"{out.name}: tuned in {seconds:.0f} s, {of_cpu:.0f} s of CPU time", flush=True)
    return made


def ask(model: Path, folder: Path, records: Sequence[dict[str, Any]]) -> tuple[float, list[str]]:
    """Return the share of exact answers to the first question about each page, and a line for each wrong answer."""
    questions = [
        (folder / "images" / record["image"], asked["value"].removeprefix("<image>\n"), answer["value"])
        for record in records
        for asked, answer in [record["conversations"][:2]]
    ]
    return score(load_chat(model), questions, batch_size=10, image_first=True)


def compare_letters(
    out: Path, start: Path, names: Sequence[str], images: int, unseen: int, heights: Sequence[float]
) -> None:
    """Tune a model for each resolution, and write its curve beside those of other models that are already there."""
    data = out / "sheets"
    spread = LARGEST / SMALLEST
    write_pages(data, images, "training", lambda rng, n: draw_sheet(rng, n, SMALLEST * spread ** rng.random())[:2])
    file = out / "letters.heights.json"
    cut = partial(draw_unseen, cut=True)
    for name in names:
        model = tune(start, data, RESOLUTIONS[name], out / name)
        points = []
        for height in heights:
            folder = out / "unseen" / f"{height:g}"
            records = write_pages(folder, unseen, f"unseen/{height:g}", partial(draw_unseen, height=height))
            share, _ = ask(model, folder, records)
            low, high = wilson(share, len(records))
            points.append(HeightPoint(height, 100 * share, 100 * low, 100 * high, len(records), len(records), 0))
            print(f"{name}: {height:g} px: {share:.0%}", flush=True)
        others = read_height_results(file).curves if file.is_file() else ()
        curves = {curve.name: curve for curve in others}
        curves[name] = HeightCurve(name, Setting(model=str(model), temperature=0.0), SIDE, tuple(points), {})
        ordered = tuple(curves[known] for known in RESOLUTIONS if known in curves)
        results = HeightResults("unseen sheets", "exact_match", unseen, "none", "the drawing", ordered)
        write_height_results(results, file)
        write_heights_page(out / "letters.heights.html", [view_heights(results)])
        folder = out / "unseen/cut"
        records = write_pages(folder, unseen, "unseen/cut", lambda rng, n: cut(rng, n, rng.uniform(*CUT_HEIGHTS)))
        add_figure(out / "letters.cut.json", name, *ask(model, folder, records), len(records))


def compare_receipts(out: Path, start: Path, names: Sequence[str], images: int, unseen: int) -> None:
    """Tune the plain model and the one with tiles on receipts, and ask for one field of unseen ones."""
    data, folder = out / "receipts", out / "unseen_receipts"
    write_pages(data, images, "receipts", lambda rng, _: draw_receipt(rng))
    records = write_pages(folder, unseen, "unseen receipts", lambda rng, _: draw_receipt(rng))
    for name in names:
        tuned = out / name / "model"
        resolution = RECEIPT_TILES if isinstance(RESOLUTIONS[name], Tiles) else RESOLUTIONS[name]
        model = tune(tuned if tuned.is_dir() else start, data, resolution, out / f"receipts-{name}")
        add_figure(out / "receipts.json", name, *ask(model, folder, records), len(records))


def add_figure(path: Path, name: str, share: float, wrong: Sequence[str], asked: int) -> None:
    """Write a model's share of exact answers beside those of other models that are already there."""
    low, high = wilson(share, asked)
    figures = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    figures[name] = {"exact_match": share, "interval": [low, high], "asked": asked}
    print(f"{name}: {share:.0%} ({low:.0%} to {high:.0%}) of {asked}", *wrong[:8], sep="\n  ", flush=True)
    write_json(path, dict(sorted(figures.items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("letters", "receipts"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a trained tiny model; without it, the quickstart trains one")
    parser.add_argument("--models", nargs="+", choices=list(RESOLUTIONS), default=["plain", "tiles-2x2"])
    parser.add_argument("--images", type=int, help="number of training images; default 5,000, and 1,600 receipts")
    parser.add_argument("--unseen", type=int, default=100, help="number of unseen images, at each height")
    parser.add_argument("--heights", nargs="+", type=float, default=HEIGHTS, help="heights of unseen sheets' letters")
    args = parser.parse_args()

    began = time.perf_counter()
    start = args.start or run_quickstart(args.out / "first").model
    if args.what == "letters":
        compare_letters(args.out, start, args.models, args.images or 5000, args.unseen, args.heights)
    else:
        compare_receipts(args.out, start, args.models, args.images or 1600, args.unseen)
    print(f"{time.perf_counter() - began:.0f} s in all, {time.process_time():.0f} s of CPU time")


if __name__ == "__main__":
    main()
