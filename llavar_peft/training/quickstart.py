"""The quickstart: train a tiny model to read, on a machine without a GPU, downloaded weights or network access.

The recipe has the paper's stages: stage 1 trains the projector and, in LLaVAR, two embedding rows; stage 2 the
projector and the language model or adapters on it; the vision tower is frozen. Only the parts are tiny. The package
contains two pairs of them; ``examples/tiny_parts`` trains them from scratch.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llavar_peft.atomic_files import check_output_folder, disk_errors, write_json
from llavar_peft.compat.usable_cores import usable_cores
from llavar_peft.datagen.synth.synth_settings import SynthSettings, Task
from llavar_peft.datagen.synth.write_synthetic import SynthResult, write_synthetic
from llavar_peft.errors import ConfigError
from llavar_peft.recipe.presets import load_recipe
from llavar_peft.recipe.schema import Lora, Recipe
from llavar_peft.types import Quantization, expand_home

if TYPE_CHECKING:
    from llavar_peft.inference.chat import Chat

logger = logging.getLogger(__name__)

QuickstartTune = Literal["full", "lora", "qlora"]
QuickstartParts = Literal["llavar", "modern"]
_HELD_OUT_IMAGES = 200
_BLANK_IMAGES = 100
_WIDTH = 320  # pixels; takes two thirds of the time of 448
_HELD_OUT_SEED = 1_000_003  # far from the seeds of the training images, so that no string occurs in both
_LORA_LEARNING_RATE = 2.5e-3
_STAGE_1_IMAGES = 800
_ABOUT_IMAGES = (
    "The images are synthetic: signs, covers, posters and receipts in several fonts, sizes and colors, with text at "
    "random positions. The text consists of random letters and digits, except those that some fonts draw alike (O and "
    "0, I, l and 1). The held-out images contain strings that no training image contains."
)
_ABOUT_PARTS = (
    "Like {}, the parts are pretrained separately: the vision tower on images of random text, the "
    "language model on writing words and answering from text. examples/tiny_parts trains both from scratch."
)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A pair of tiny parts.

    Attributes:
        assets: Their folder in the package.
        folder: Their folder in the output, which differs so that no run finds the parts of another.
        title: What the page calls the model.
        examples: Well-known parts of their kinds.
        settings: What ``model`` of the recipe says besides the parts.
        images: Number of images of stage 2.
        learning_rate: Of full tuning in stage 2.
    """

    assets: str
    folder: str
    title: str
    examples: str
    settings: dict[str, Any]
    images: int
    learning_rate: float


_PAIRS: dict[QuickstartParts, _Pair] = {
    "llavar": _Pair("assets/tiny", "parts", "a tiny LLaVAR", "CLIP and Vicuna", {}, 4200, 1.4e-3),
    "modern": _Pair(
        "assets/tiny_modern",
        "modern_parts",
        "a tiny Qwen 2 with SigLIP",
        "SigLIP and Qwen 2",
        {"template": "chat", "projector_type": "mlp2x_gelu"},
        8000,  # its steps are shorter
        7e-4,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuickstartResult:
    """The result of a quickstart.

    Attributes:
        page: The HTML page.
        model: Folder of the trained model, or of the adapter, which names its base.
        exact_match: Share of unseen images that are answered exactly.
        blank_exact_match: The same share with blank images, which measures guessing.
        before: The same share before training.
        seconds: Wall time of the whole quickstart.
    """

    page: Path
    model: Path
    exact_match: float
    blank_exact_match: float
    before: float
    seconds: float


def run_quickstart(
    output_dir: str | Path, tune: QuickstartTune = "full", *, seed: int = 0, parts: QuickstartParts = "llavar"
) -> QuickstartResult:
    """Draw images, train both stages, score unseen images and write the page.

    An interrupted quickstart is resumed when it is run again in the same folder.

    Args:
        output_dir: Folder for the data, the parts, the run and its page.
        tune: What stage 2 trains: the whole language model, adapters, or adapters on a 4-bit base.
        seed: Seed of the images, the projector and the order of the records.
        parts: ``"llavar"``: CLIP, a linear projector and LLaMA; ``"modern"``: SigLIP, a projector of two layers and
            Qwen 2 with its chat template.

    Raises:
        ConfigError: The folder contains a run with other settings.
        InterruptedRunError: The run was stopped by a signal and saved.
    """
    began = time.perf_counter()
    root = expand_home(output_dir).resolve()
    recipe = quickstart_recipe(root, tune, seed=seed, parts=parts)
    check_output_folder(root, "--output-dir")
    with disk_errors(root, only_full=True):
        copy_parts(root, parts)
        _draw(root, _PAIRS[parts].images, seed=seed)
    # Imported after drawing, so that the processes forked for it do not contain torch.
    from llavar_peft.inference.chat import load_chat
    from llavar_peft.page.run_page import write_run_page
    from llavar_peft.training.trainer import run_recipe

    model = run_recipe(recipe)
    chat = load_chat(model)
    held_out = _draw_held_out(root, seed)
    exact, wrong = score(chat, held_out)
    blank, _ = score(chat, held_out[:_BLANK_IMAGES], blank=True)
    before = _score_before_training(root / recipe.stages[0].name / "probe.jsonl")
    seconds = time.perf_counter() - began
    page = write_run_page(
        root,
        title=f"Quickstart: {_PAIRS[parts].title} learns to read ({tune})",
        extra=(
            ("Exact match before training", f"{before:.1%}"),
            (f"Exact match on {len(held_out)} unseen images", f"{exact:.1%}"),
            ("Exact match with blank images", f"{blank:.1%}"),
            ("Wall time, this run", f"{seconds:.0f} s"),
        ),
        notes=(_ABOUT_IMAGES, _ABOUT_PARTS.format(_PAIRS[parts].examples), *(f"Wrong: {line}" for line in wrong[:8])),
        model_dir=str(model),
    )
    result = QuickstartResult(
        page=page, model=model, exact_match=exact, blank_exact_match=blank, before=before, seconds=seconds
    )
    asked = {"tune": tune, "parts": parts, "seed": seed}
    write_json(
        root / "quickstart.json", {**dataclasses.asdict(result), "page": str(page), "model": str(model), **asked}
    )
    return result


def quickstart_recipe(root: Path, tune: QuickstartTune, *, seed: int = 0, parts: QuickstartParts = "llavar") -> Recipe:
    """Return the shipped recipe ``tiny`` with the quickstart's paths and parts and the selected ``tune`` in stage 2.

    Raises:
        ConfigError: ``tune`` or ``parts`` is unknown.
    """
    if parts not in _PAIRS:
        raise ConfigError.at("--parts", f"unknown value (got {parts!r})", f"use {' or '.join(_PAIRS)}")
    if tune not in ("full", "lora", "qlora"):
        raise ConfigError.at("--tune", f"unknown value (got {tune!r})", "use full, lora or qlora")
    preset = load_recipe("tiny")
    quantize: Quantization | None = "nf4" if tune == "qlora" else None
    pair = _PAIRS[parts]
    model = dataclasses.replace(
        preset.model,
        language_model=str(root / pair.folder / "language_model"),
        vision_tower=str(root / pair.folder / "vision_tower"),
        quantize=quantize,
        **pair.settings,
    )
    stages = []
    for stage, folder in zip(preset.stages, ("stage1", "stage2"), strict=True):
        data = dataclasses.replace(
            stage.data,
            records=str(root / "data" / folder / "records.json"),
            images=str(root / "data" / folder / "images"),
        )
        stages.append(dataclasses.replace(stage, data=data))
    rate = pair.learning_rate if tune == "full" else _LORA_LEARNING_RATE
    stages[1] = dataclasses.replace(stages[1], optim=dataclasses.replace(stages[1].optim, learning_rate=rate))
    if tune != "full":
        stages[1] = dataclasses.replace(stages[1], tune=Lora(rank=16, alpha=32.0, dropout=0.0))
    return dataclasses.replace(preset, model=model, stages=tuple(stages), output_dir=str(root), seed=seed)


def score(
    chat: Chat,
    questions: Sequence[tuple[Path, str, str]],
    *,
    blank: bool = False,
    batch_size: int = 25,
    image_first: bool = False,
) -> tuple[float, list[str]]:
    """Return the share of exact answers to questions about images, and a line for each wrong answer.

    Args:
        chat: The model.
        questions: Triples of image, question and expected answer.
        blank: Whether each image is replaced by a blank one of its size, in the color of its corner.
        batch_size: Number of images per forward pass.
        image_first: As in ``Chat.request``.
    """
    from PIL import Image

    from llavar_peft.data.image_files import open_image
    from llavar_peft.data.text_metrics import exact_match
    from llavar_peft.inference.token_sampling import Sampling

    right, wrong = 0, []
    sampling = Sampling(temperature=0.0, max_new_tokens=24)
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        images = [open_image(path) for path, _, _ in batch]
        if blank:
            images = [Image.new("RGB", image.size, image.getpixel((0, 0))) for image in images]
        requests = [
            chat.request(image, question, sampling=sampling, image_first=image_first)
            for image, (_, question, _) in zip(images, batch, strict=True)
        ]
        for (path, question, truth), answer in zip(batch, chat.answer(requests, batch_size=batch_size), strict=True):
            if exact_match(answer.text, truth):
                right += 1
            else:
                wrong.append(f"{path.name}: {question} expected {truth!r}, got {answer.text!r}")
    return right / len(questions), wrong


def copy_parts(root: Path, kind: QuickstartParts) -> None:
    """Copy a pair of tiny parts out of the package into a folder below ``root``, unless they exist."""
    pair = _PAIRS[kind]
    parts = root / pair.folder
    if not parts.is_dir():
        staged = root / f".{pair.folder}"
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(str(package_files("llavar_peft") / pair.assets), staged)
        staged.rename(parts)


def _draw(root: Path, images: int, *, seed: int) -> None:
    """Write the training images, of which stage 2 has a number, unless they exist."""
    sets: tuple[tuple[str, Task, int], ...] = (
        ("stage1", "transcribe", _STAGE_1_IMAGES),
        ("stage2", "conversation", images),
    )
    for number, (folder, task, count) in enumerate(sets):
        if not (root / "data" / folder).is_dir():
            staged = root / "data" / f".{folder}"
            shutil.rmtree(staged, ignore_errors=True)
            _write(staged, count, seed * 10 + number, task, min(4, usable_cores()))
            staged.rename(root / "data" / folder)


def _write(folder: Path, count: int, seed: int, task: Task, workers: int) -> SynthResult:
    settings = SynthSettings(style="plain", seed=seed, task=task, width=_WIDTH)
    return write_synthetic(folder, count, settings, workers)


def _draw_held_out(root: Path, seed: int) -> list[tuple[Path, str, str]]:
    folder = root / "data/held_out"
    if not (folder / "records.json").is_file():
        _write(folder, _HELD_OUT_IMAGES, _HELD_OUT_SEED + seed, "question", 1)
    records: list[dict[str, Any]] = json.loads((folder / "records.json").read_text(encoding="utf-8"))
    return [
        (
            folder / "images" / record["image"],
            record["conversations"][0]["value"].replace("<image>", "").strip(),
            record["conversations"][1]["value"],
        )
        for record in records
    ]


def _score_before_training(path: Path) -> float:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    return next((float(line["exact_match"] or 0.0) for line in lines if line["when"] == "start"), 0.0)
