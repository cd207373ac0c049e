"""``llavar-peft eval heights``: accuracy against the height of letters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llavar_peft.atomic_files import check_output_file
from llavar_peft.cli import evaluation_model as evaluated
from llavar_peft.cli import shared_options as shared
from llavar_peft.cli.output import format_interval, print_table, resumable, say, say_json, say_next, show_count
from llavar_peft.errors import ConfigError
from llavar_peft.types import ImageMode, Quantization

if TYPE_CHECKING:
    from llavar_peft.data.image_roots import ImageRoots
    from llavar_peft.evaluation.heights.height_plan import HeightPlan, HeightSettings
    from llavar_peft.evaluation.heights.height_results import HeightCurve, HeightResults
    from llavar_peft.evaluation.vqa.scored_results import Setting
    from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion
    from llavar_peft.models.processing_llavar import LlavarProcessor

_SYNTH_SEED = 2_000_003  # far from the seeds of training images, so that no string occurs in both


@dataclass(frozen=True)
class _Asked:
    """The questions whose answers were found, and the number of the others by reason."""

    name: str
    total: int
    questions: Sequence[VqaQuestion]
    left_out: dict[str, int]
    roots: ImageRoots
    measured: str


def eval_heights(
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            help="FOLDER or NAME=FOLDER of a checkpoint, adapter or run. Repeat the option for several curves.",
        ),
    ],
    dataset: Annotated[
        Path | None,
        typer.Option("--dataset", help="The questions: a file of OCR-VQA or another one that 'eval vqa' reads."),
    ] = None,
    images: shared.ImagesOption = None,
    synth: Annotated[bool, typer.Option("--synth", help="Draw the images, instead of --dataset.")] = False,
    count: Annotated[int, typer.Option("--n", min=1, help="With --synth: number of images.")] = 200,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            help="FOLDER or NAME=FOLDER of an adapter of the only --model: a further curve. Repeat the option for "
            "several.",
        ),
    ] = None,
    vision_tower: shared.VisionTowerOption = None,
    quantize: shared.QuantizeOption = None,
    heights: Annotated[
        str, typer.Option("--heights", help="Letter heights in pixels of the prepared image, e.g. 3-19 or 3,5,7.")
    ] = "3-19",
    side: Annotated[
        int | None,
        typer.Option(
            "--side", help="Side in pixels of the prepared image that heights refer to. Default: that of each model."
        ),
    ] = None,
    too_small: Annotated[
        Literal["omit", "fewer", "crop"],
        typer.Option(
            "--too-small",
            help="Questions whose letters are lower than a height even where the image fills the view: omit them at "
            "all heights, ask fewer at the heights they do not reach, or crop their image around the answer.",
        ),
    ] = "omit",
    most_enlarged: Annotated[
        float, typer.Option("--most-enlarged", help="Largest factor by which letters are enlarged from the file's.")
    ] = 2.0,
    readings: Annotated[
        Path | None,
        typer.Option(
            "--readings", help="Records of 'ocr build' on the same images, whose readings say where answers stand."
        ),
    ] = None,
    engine: Annotated[
        Literal["rapidocr", "tesseract"],
        typer.Option("--engine", help="Without --readings: the OCR engine that finds answers without a box."),
    ] = "rapidocr",
    metric: Annotated[
        str, typer.Option("--metric", help="The scoring protocol. Default: the paper's.")
    ] = "multimodalocr",
    image_mode: shared.ImageModeOption = None,
    prompt: evaluated.PromptOption = "{question}",
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="Sampling temperature; 0 takes the most probable token.")
    ] = 0.0,
    max_new_tokens: shared.MaxNewTokensOption = 256,
    batch_size: evaluated.BatchSizeOption = 8,
    seed: evaluated.SamplingSeedOption = 0,
    limit: evaluated.LimitOption = None,
    split: evaluated.SplitOption = None,
    workers: shared.WorkersOption = None,
    out: Annotated[
        Path, typer.Option("--out", help="The figures to write (.json). Their page and the answers are next to them.")
    ] = Path("letters.heights.json"),
    as_json: shared.JsonOption = False,
) -> None:
    """Draw accuracy against the height of the answer's letters, as in the paper's figure 3, for one or several models.

    Each image is shown on a larger background, so that the letters have each height in the image that a plain model
    sees. Run the same command again to resume, or to add a model.
    """
    from llavar_peft.data.letter_canvas import parse_heights
    from llavar_peft.evaluation.heights.height_plan import HeightSettings
    from llavar_peft.evaluation.heights.height_results import HeightResults, write_height_results
    from llavar_peft.evaluation.heights.heights_view import show_seen, view_heights
    from llavar_peft.evaluation.vqa.scored_results import Setting
    from llavar_peft.evaluation.vqa.vqa_questions import read_vqa_questions
    from llavar_peft.page.heights_page import write_heights_page

    settings = HeightSettings(
        heights=parse_heights(heights),
        side=side,
        too_small=too_small,
        most_enlarged=most_enlarged,
        protocol=metric,  # type: ignore[arg-type]  # checked there
    )
    models = _name_models(model, adapter or ())
    if synth == (dataset is not None):
        raise ConfigError.at("eval heights", "it needs --dataset or --synth", "give one of them")
    if out.suffix != ".json":
        raise ConfigError.at(
            "--out", f"got {str(out)!r}, expected a name that ends in .json", "write e.g. mine.heights.json"
        )
    check_output_file(out, "--out")
    chosen = Setting(
        prompt=prompt,
        image_mode=image_mode,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
    )
    processors = [_load_processor(folder, added, vision_tower) for _, folder, added in models]
    with resumable(out):
        if dataset is None:
            asked = _draw(out, limit or count, workers)
        else:
            questions = read_vqa_questions(dataset, limit=limit, split=split)
            asked = _find(questions, str(dataset), images, readings or engine, workers, out)
        plans = [_plan(asked, settings, processor, image_mode) for processor in processors]
        curves = [
            _measure(name, folder, added, (vision_tower, quantize), asked, plan, chosen, settings, out)
            for (name, folder, added), plan in zip(models, plans, strict=True)
        ]
    results = HeightResults(asked.name, settings.protocol, asked.total, too_small, asked.measured, tuple(curves))
    write_height_results(results, out)
    view = replace(view_heights(results), seen=show_seen(plans[0], asked.roots))
    page = write_heights_page(out.with_suffix(".html"), [view])
    if as_json:
        say_json(results.as_dict())
    else:
        _print_results(results, out, page)


def _name_models(models: Sequence[str], adapters: Sequence[str]) -> list[tuple[str, Path, Path | None]]:
    """Return name, folder and adapter of each curve."""
    named = shared.parse_adapters(models, "--model")
    curves: list[tuple[str, Path, Path | None]] = [(name, folder, None) for name, folder in named.items()]
    if adapters and len(curves) > 1:
        what = f"an adapter belongs to one model (got {len(curves)})"
        raise ConfigError.at("--adapter", what, "give the folder of each adapter as --model; it names its base")
    for name, added in shared.parse_adapters(adapters).items():
        if name in named:
            raise ConfigError.at("--adapter", f"{name!r} is the name of the model too", "write NAME=FOLDER")
        curves.append((name, curves[0][1], added))
    return curves


def _draw(out: Path, count: int, workers: int | None) -> _Asked:
    """Draw images with one question each."""
    from llavar_peft.data.image_roots import ImageRoots
    from llavar_peft.datagen.synth.synth_settings import SynthSettings
    from llavar_peft.datagen.synth.write_synthetic import write_synthetic
    from llavar_peft.evaluation.vqa.vqa_questions import read_vqa_questions

    folder = out.with_suffix(".images")
    settings = SynthSettings(style="plain", seed=_SYNTH_SEED, task="question")
    with show_count("drawing") as progress:
        drawn = write_synthetic(folder, count, settings, workers, progress)
    questions = read_vqa_questions(drawn.records)
    name = f"{len(questions)} synthetic images"
    return _Asked(name, len(questions), questions, {}, ImageRoots(drawn.images), "the drawing of the images")


def _find(
    questions: Sequence[VqaQuestion],
    name: str,
    images: list[Path] | None,
    source: Path | Literal["rapidocr", "tesseract"],
    workers: int | None,
    out: Path,
) -> _Asked:
    """Find where answers stand, by the data set or else by readings or an OCR engine."""
    from llavar_peft.data.image_roots import ImageRoots
    from llavar_peft.evaluation.heights import answer_places
    from llavar_peft.evaluation.vqa.answer_questions import check_images

    roots = ImageRoots(images or ())
    check_images(questions, roots)
    unknown = list(dict.fromkeys(str(one.image) for one in questions if answer_places.needs_reading(one)))
    sources = ["the data set"] if any(one.text_height or one.box for one in questions) else []
    texts = {}
    if unknown and isinstance(source, Path):
        texts = answer_places.read_stored_texts(source, unknown)
        sources.append(f"the readings of {source.name}")
    elif unknown and not isinstance(source, Path):
        with show_count("finding the answers") as progress:
            texts = answer_places.read_texts(unknown, roots, out.with_suffix(".ocr.jsonl"), source, workers, progress)
        sources.append(f"{source} and the ink in its boxes")
    found, left_out = answer_places.find_answers(questions, texts, roots)
    return _Asked(name, len(questions), found, left_out, roots, " and ".join(sources))


def _load_processor(model: Path, adapter: Path | None, vision_tower: str | None) -> LlavarProcessor:
    """Load a model's processor, and check that there is an adapter, before anything is drawn, read or asked."""
    from llavar_peft.models.build_model import load_processor
    from llavar_peft.weights.adapter.adapter_files import read_settings
    from llavar_peft.weights.io.hub_folders import find_folder

    if adapter is not None:
        read_settings(find_folder(adapter, "adapter"))
    model = find_folder(model, "model")
    inside = (model, model / "model", model / "adapter")
    folder = next((one for one in inside if (one / "config.json").is_file()), model)
    return load_processor(str(folder), vision_tower=vision_tower)


def _plan(
    asked: _Asked, settings: HeightSettings, processor: LlavarProcessor, image_mode: ImageMode | None
) -> HeightPlan:
    """Decide what a model is asked, before its weights are loaded."""
    from llavar_peft.evaluation.heights.height_plan import plan_heights

    mode = image_mode or processor.inference_image_mode
    return plan_heights(asked.questions, asked.roots, settings, mode, processor, asked.left_out)


def _measure(
    name: str,
    model: Path,
    adapter: Path | None,
    how: tuple[str | None, Quantization | None],
    asked: _Asked,
    plan: HeightPlan,
    chosen: Setting,
    settings: HeightSettings,
    out: Path,
) -> HeightCurve:
    """Load a model, and ask it."""
    from llavar_peft.evaluation.heights.measure_heights import measure_curve

    vision_tower, quantize = how
    chat, setting = evaluated.load_evaluated_model(model, adapter, vision_tower, quantize, chosen)
    journals = out.with_suffix(".answers") / _journal_stem(setting, quantize, chat.engine.processor.resolution)
    with show_count(f"asking {name}") as progress:
        return measure_curve(name, chat, plan, asked.roots, setting, settings, journals, progress)


def _journal_stem(setting: Setting, quantize: str | None, resolution: dict[str, Any] | None) -> str:
    """Return how the journals of a model are named: by its weights, how they are stored, and how it sees an image."""
    parts = [str(setting.model_hash), *([quantize] if quantize else [])]
    if resolution is not None:
        parts.append(hashlib.sha256(json.dumps(resolution, sort_keys=True).encode()).hexdigest()[:8])
    return "-".join(parts)


def _print_results(results: HeightResults, out: Path, page: Path) -> None:
    from llavar_peft.evaluation.heights.height_results import describe_crossing
    from llavar_peft.evaluation.heights.heights_view import describe_heights, find_in_heights, question_count

    rows = [
        (curve.name, point.height, point.questions, f"{point.value:.1f}", format_interval(point.low, point.high))
        for curve in results.curves
        for point in curve.points
    ]
    titles = ("model", "height, px", "questions", f"{results.protocol} %", "95 % interval")
    print_table(titles, [(name, f"{height:g}", *rest) for name, height, *rest in rows])
    crossings = [
        (
            curve.name,
            question_count(curve),
            f"{curve.best:.1f}",
            *(describe_crossing(one, curve.points) for one in curve.crossings),
        )
        for curve in results.curves
    ]
    print_table(("model", "questions", "best %", "below 90 % at", "below half of the best at"), crossings)
    for sentence in describe_heights(results):
        say(sentence)
    say(f"{'figures':<12} {out}")
    say(f"{'page':<12} {page}")
    say_next(find_in_heights(results))
