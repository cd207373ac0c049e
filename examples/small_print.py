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
import shutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from small_print_pages import SIDE, draw_receipt, draw_sheet_between, draw_unseen, draw_word, write_pages

from llavar_peft import CrossAttention, DataConfig, ModelConfig, Tiles, load_chat
from llavar_peft.atomic_files import write_json
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


@dataclasses.dataclass(frozen=True)
class Sheets:
    """Sheets that models are tuned on and compared on. Heights are in pixels of the plain model's view.

    Attributes:
        folder: Where the sheets are.
        smallest: Least height of letters in training.
        largest: Greatest height of letters in training.
        heights: Heights at which models are compared.
        tiles: Number of tiles along each side, whose edges cut none of the letters that are compared.
        cut: Least and greatest height of letters that are cut, and asked for apart.
    """

    folder: str
    smallest: float
    largest: float
    heights: tuple[float, ...]
    tiles: int
    cut: tuple[float, float]


SHEETS = Sheets("sheets", 4.5, 12.0, (4.5, 5.0, 5.5, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0), 2, (6.0, 9.0))
SMALLER = Sheets("smaller_sheets", 2.5, 6.0, (2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0), 4, (3.5, 5.0))
RESOLUTIONS: dict[str, Tiles | CrossAttention | None] = {
    "plain": None,
    "tiles-2x2": Tiles(grid=((2, 2),)),
    "tiles-4x4": Tiles(grid=((4, 4),)),
    "tiles-4x4-pooled": Tiles(grid=((4, 4),), pool=2),
    "cross-attention-2": CrossAttention(grid=2),
    "cross-attention-4": CrossAttention(grid=4),
}
RECEIPT_TILES = Tiles(grid=((2, 3), (3, 3), (4, 3)))
POSITIONS = 4096
"""Tokens that a model with 4 x 4 tiles can take; an image has about 2,500."""
LESSONS = ((1, 1, 800), (2, 2, 4000))
"""Least and greatest number of letters, and number of pages, on which cross-attention is trained before the sheets."""
WORD_HEIGHTS = (4.5, 9.0)
"""Least and greatest height of the letters in these lessons."""


def tune(
    start: Path, records: Path, resolution: Tiles | CrossAttention | None, out: Path, *, projector: bool = False
) -> Path:
    """Tune a model on pages with a resolution, by the second stage of the quickstart's recipe, or by the first."""
    preset = load_recipe("tiny")
    stage = preset.stages[0 if projector else 1]
    config = DataConfig(records=str(records / "records.json"), images=str(records / "images"), holdout=0, workers=0)
    faster = 5e-3 if isinstance(resolution, CrossAttention) else None  # for modules that are not pretrained
    optim = dataclasses.replace(stage.optim, projector_learning_rate=faster)
    stage = dataclasses.replace(stage, data=config, max_length=POSITIONS, optim=optim)
    model = ModelConfig(checkpoint=str(start), dtype="float32", resolution=resolution)
    began, before = time.perf_counter(), time.process_time()
    made = run_recipe(dataclasses.replace(preset, model=model, stages=(stage,), output_dir=str(out)))
    seconds, of_cpu = time.perf_counter() - began, time.process_time() - before
    print(f"{out.name}: tuned in {seconds:.0f} s, {of_cpu:.0f} s of CPU time", flush=True)
    return made


def lengthen(start: Path, out: Path) -> Path:
    """Copy a model, and let it take more tokens. Its positions are rotary, so that no weight depends on their number."""
    shutil.copytree(start, out, dirs_exist_ok=True)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["max_position_embeddings"] = POSITIONS
    write_json(out / "config.json", config)
    return out


def teach_words(start: Path, out: Path, resolution: CrossAttention, most_pages: int, unseen: int) -> Path:
    """Train cross-attention on single letters, then on words of two, before it meets whole sheets."""
    for fewest, most, count in LESSONS:
        name = f"words-{fewest}-{most}"
        pages, unseen_pages = out.parent / name, out.parent / f"unseen_{name}"
        low, high = WORD_HEIGHTS
        write_pages(
            pages, min(count, most_pages), name, partial(draw_word, low=low, high=high, fewest=fewest, most=most)
        )
        start = tune(start, pages, resolution, out.parent / f"{out.name}-{name}", projector=most == 1)
        draw = partial(draw_word, low=6.0, high=6.0, fewest=fewest, most=most)
        share, wrong = ask(start, unseen_pages, write_pages(unseen_pages, unseen, f"unseen/{name}", draw))
        print(f"{out.name}: words of {fewest} to {most} letters: {share:.0%}", *wrong[:4], sep="\n  ", flush=True)
    return start


def ask(model: Path, folder: Path, records: Sequence[dict[str, Any]]) -> tuple[float, list[str]]:
    """Return the share of exact answers to the first question about each page, and a line for each wrong answer."""
    questions = [
        (folder / "images" / record["image"], asked["value"].removeprefix("<image>\n"), answer["value"])
        for record in records
        for asked, answer in [record["conversations"][:2]]
    ]
    return score(load_chat(model), questions, batch_size=10, image_first=True)


def compare_letters(
    out: Path, start: Path, names: Sequence[str], images: int, unseen: int, heights: Sequence[float] | None
) -> None:
    """Tune a model for each resolution, and write its curve beside those of other models that are already there."""
    for name in names:
        sheets = SMALLER if name.startswith("tiles-4x4") else SHEETS
        data = out / sheets.folder
        write_pages(data, images, "training", partial(draw_sheet_between, low=sheets.smallest, high=sheets.largest))
        model = tune(prepare(out, start, name, images, unseen), data, RESOLUTIONS[name], out / name)
        points = []
        for height in heights or sheets.heights:
            folder = out / f"unseen_{sheets.folder}" / f"{height:g}"
            draw = partial(draw_unseen, low=height, high=height, tiles=sheets.tiles)
            records = write_pages(folder, unseen, f"unseen/{height:g}", draw)
            share, _ = ask(model, folder, records)
            low, high = wilson(share, len(records))
            points.append(HeightPoint(height, 100 * share, 100 * low, 100 * high, len(records), len(records), 0))
            print(f"{name}: {height:g} px: {share:.0%}", flush=True)
        setting = Setting(model=str(model), temperature=0.0)
        add_curve(out, unseen, HeightCurve(name, setting, SIDE, tuple(points), {}))
        folder, (low, high) = out / f"unseen_{sheets.folder}" / "cut", sheets.cut
        draw = partial(draw_unseen, low=low, high=high, tiles=sheets.tiles, cut=True)
        records = write_pages(folder, unseen, "unseen/cut", draw)
        add_figure(out / "letters.cut.json", name, *ask(model, folder, records), len(records))


def prepare(out: Path, start: Path, name: str, images: int, unseen: int) -> Path:
    """Return the model that is tuned on the sheets with a resolution."""
    resolution = RESOLUTIONS[name]
    if isinstance(resolution, CrossAttention):
        return teach_words(start, out / name, resolution, images, unseen)
    return lengthen(start, out / f"{name}-start") if name.startswith("tiles-4x4") else start


def add_curve(out: Path, unseen: int, curve: HeightCurve) -> None:
    """Write a model's curve, and the chart, beside those of other models that are already there."""
    file = out / "letters.heights.json"
    others = read_height_results(file).curves if file.is_file() else ()
    curves = {known.name: known for known in (*others, curve)}
    ordered = tuple(curves[name] for name in RESOLUTIONS if name in curves)
    results = HeightResults("unseen sheets", "exact_match", unseen, "none", "the drawing", ordered)
    write_height_results(results, file)
    write_heights_page(out / "letters.heights.html", [view_heights(results)])


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
    parser.add_argument("--images", type=int, help="most training images; default 5,000, and 1,600 receipts")
    parser.add_argument("--unseen", type=int, default=100, help="number of unseen images, at each height")
    parser.add_argument("--heights", nargs="+", type=float, help="heights of unseen sheets' letters")
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
