"""Train a tiny vision tower, CLIP's or SigLIP's, to predict the character in each patch of a page of random text.

The losses are applied to hidden state -2, which LLaVA reads; the last layer is unused, as CLIP's is in LLaVA. One loss
trains a linear head to predict the characters, the other a linear map to produce a code for each of them. With the
first loss alone, the characters can only be separated by the softmax after the head, and no projector can turn the
features into embeddings.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import numpy as np
import torch
from grid import BLANK, SIDE
from optimizers import make_optimizers
from pages import (
    CLIP_EYE,
    SIGLIP_EYE,
    Eye,
    Page,
    colour_page,
    layout_page,
    letter_page,
    plain_layout_page,
    plain_page,
    random_page,
    shift_page,
    targets,
)
from torch import Tensor, nn
from tower_start import HEADS, HIDDEN, body, rescale, start_like_a_convolution
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

Tower: TypeAlias = CLIPVisionModel | SiglipVisionModel

LAYERS, MLP = 3, 1024
PLAIN = 0.25
"""Share of the pages of single letters that are black on white."""
CODE_WEIGHT = 10.0
"""Weight of the squared error of the cells' codes, which makes the features useful to a linear projector."""
CLEAR = 0.9
"""Share from which a cell counts as containing its character."""
FEATURE_RMS = 1.0
"""Root mean square that hidden state -2 is scaled to at the end, to suit a new `nn.Linear`."""


def features(tower: Tower, pixels: Tensor) -> Tensor:
    """Return the output of the second to last layer without the class token: LLaVA's hidden state -2."""
    return tower(pixels, output_hidden_states=True).hidden_states[LAYERS - 1][:, -SIDE * SIDE :]


@dataclass(frozen=True)
class Lesson:
    """The settings of one training run over pages.

    Args:
        pages: Number of pages of random text to draw.
        steps: Optimizer steps.
        rate: Peak learning rate.
        easy: Share of the steps with pages of single letters.
        layouts: Share of the other pages that have the quickstart's layouts.
        heads_first: Number of steps in which only the heads are trained.
        seed: Of the pages and of all random draws.
        batch: Pages per step.
    """

    pages: int
    steps: int
    rate: float
    easy: float
    layouts: float
    heads_first: int
    seed: int
    batch: int = 16

    def scaled(self, scale: float) -> "Lesson":
        """Return the lesson with a fraction of the steps and pages, for a trial run."""
        sizes = {"pages": max(32, round(self.pages * scale)), "steps": max(2, round(self.steps * scale))}
        return replace(self, **sizes, heads_first=round(self.heads_first * scale))


FIRST = Lesson(pages=12000, steps=7500, rate=5e-3, easy=0.04, layouts=0.35, heads_first=0, seed=0)
LESSONS = (
    FIRST,
    Lesson(pages=12000, steps=6000, rate=2.5e-3, easy=0, layouts=0.7, heads_first=200, seed=1),
    Lesson(pages=12000, steps=4500, rate=2.5e-3, easy=0, layouts=0.9, heads_first=200, seed=2),
)
"""Each lesson starts from the previous lesson's file, and can be repeated alone."""
HELD_OUT = 96


@dataclass(frozen=True)
class Kind:
    """A kind of tower and what it is taught.

    Args:
        new: Makes a tower with random weights.
        eye: The form of its images.
        page: Draws a page of random text, of which a share has the quickstart's layouts.
        layout: Draws a page in one of these layouts.
        image_processor: What `preprocessor_config.json` says besides the settings that all towers share.
        lessons: In their order; the first starts from random initialization.
    """

    new: Callable[[], Tower]
    eye: Eye
    page: Callable[[Random, Eye, float], Page]
    layout: Callable[[Random, Eye], Page]
    image_processor: Mapping[str, Any]
    lessons: tuple[Lesson, ...]


def _new_clip() -> CLIPVisionModel:
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            image_size=CLIP_EYE.pixels, patch_size=CLIP_EYE.cell, projection_dim=HIDDEN, layer_norm_eps=1e-5,
        )
    )  # fmt: skip


def _new_siglip() -> SiglipVisionModel:
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=HIDDEN, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            image_size=SIGLIP_EYE.pixels, patch_size=SIGLIP_EYE.cell, vision_use_head=False,
        )
    )  # fmt: skip


CLIP = Kind(
    new=_new_clip,
    eye=CLIP_EYE,
    page=random_page,
    layout=layout_page,
    image_processor={
        "crop_size": {"height": CLIP_EYE.pixels, "width": CLIP_EYE.pixels},
        "do_center_crop": True,
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": CLIP_EYE.pixels},
    },
    lessons=LESSONS,
)
SIGLIP = Kind(
    new=_new_siglip,
    eye=SIGLIP_EYE,
    page=plain_page,
    layout=plain_layout_page,
    image_processor={
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": SIGLIP_EYE.pixels, "width": SIGLIP_EYE.pixels},
    },
    lessons=(
        Lesson(pages=3000, steps=1500, rate=4e-3, easy=0, layouts=0.4, heads_first=0, seed=0, batch=8),
        Lesson(pages=3000, steps=1600, rate=3e-3, easy=0, layouts=0.6, heads_first=100, seed=1, batch=8),
        Lesson(pages=4000, steps=1500, rate=2e-3, easy=0, layouts=0.8, heads_first=100, seed=2, batch=8),
    ),
)


class Pages:
    """The pages in training order: single letters first, then the other pages, repeated.

    Args:
        easy: Number of pages of single letters.
        lesson: Its number of other pages; each use of one has new colors and an offset of up to nine tenths of a cell.
        kind: Of the tower.
    """

    def __init__(self, easy: int, lesson: Lesson, kind: Kind) -> None:
        self.easy, self.seed, layouts, name = easy, lesson.seed, lesson.layouts, f"page/{lesson.seed}"
        self.size, self.eye = lesson.batch, kind.eye
        self.pages = [_pixels(letter_page(Random(f"letters/{self.seed}/{n}"), n / easy, self.eye)) for n in range(easy)]
        self.pages += [_pixels(kind.page(Random(f"{name}/{n}"), self.eye, layouts)) for n in range(lesson.pages)]

    def batch(self, step: int, size: int, *, plain: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return pixels, classes and shares of a step's pages."""
        rng, images, texts = np.random.default_rng([self.seed, step]), [], []
        far = self.eye.cell * 9 // 10
        for n in range(step * size, (step + 1) * size):
            page = self.pages[n] if n < self.easy else self.pages[self._drawn(n - self.easy)]
            if n >= self.easy:
                page = shift_page(*page, *rng.integers(-far, far + 1, 2).tolist(), self.eye)
            images.append(colour_page(page[0], page[2], rng, self.eye, plain=plain))
            texts.append(page[1])
        return torch.from_numpy(np.stack(images)), *targets(texts)

    def _drawn(self, n: int) -> int:
        epoch, place = divmod(n, len(self.pages) - self.easy)
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.pages) - self.easy)
        return self.easy + int(order[place])


def _pixels(page: Page) -> tuple[np.ndarray, list[list[tuple[str, float, float]]], tuple[float, float, float, float]]:
    return np.asarray(page[0]), page[1], page[2]


def _ahead(pages: Pages, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield the batches, each prepared while the previous one is trained on."""
    size = pages.size
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(pages.batch, 0, size, plain=pages.easy > 0)
        for step in range(1, steps + 1):
            ready = coming.result()
            if step < steps:
                coming = pool.submit(pages.batch, step, size, plain=step * size < PLAIN * pages.easy)
            yield ready


def make_vision_tower(directory: Path, kind: Kind, lessons: Sequence[Lesson]) -> None:
    """Train a tower and write it as a Hugging Face folder.

    Args:
        directory: Folder for `config.json`, `model.safetensors` and `preprocessor_config.json`. The results of all
            lessons but the last are kept in folders next to it.
        kind: Of tower.
        lessons: The kind's, or shorter ones.
    """
    torch.manual_seed(lessons[0].seed)
    tower = kind.new()
    start_like_a_convolution(tower)
    names = [*(f"{directory.name}_lesson_{number}" for number in range(1, len(lessons))), directory.name]
    for number, (lesson, name) in enumerate(zip(lessons, names, strict=True)):
        if number > 0:
            torch.manual_seed(lesson.seed)
            tower = type(tower).from_pretrained(directory.with_name(names[number - 1]), dtype=torch.float32)
        teach(tower, kind, lesson, directory.with_name(name))


def teach(tower: Tower, kind: Kind, lesson: Lesson, directory: Path) -> None:
    """Train a tower on a lesson's pages and write it to a folder."""
    model = body(tower)
    every_layer = model.encoder.layers
    model.encoder.layers = every_layer[:-1]  # the last layer is unused: save its time
    head, code = nn.Linear(HIDDEN, BLANK + 1), nn.Linear(HIDDEN, BLANK)
    for parameter in code.parameters():
        nn.init.zeros_(parameter)  # with large initial features, random codes would dominate the loss
    started = time.perf_counter()
    drawn = Pages(round(lesson.easy * lesson.steps) * lesson.batch, lesson, kind)
    some = min(HELD_OUT, lesson.pages // 2)
    tests = [
        _held_out(draw, kind.eye, some)
        for draw in (lambda rng: kind.page(rng, kind.eye, FIRST.layouts), lambda rng: kind.layout(rng, kind.eye))
    ]
    print(f"{len(drawn.pages)} pages drawn in {time.perf_counter() - started:.0f} s", flush=True)
    parameters = [*tower.parameters(), *head.parameters(), *code.parameters()]
    optimizers, schedules = make_optimizers(
        model.encoder.layers, parameters, lesson.rate, lesson.steps, model.embeddings.parameters()
    )
    tower.requires_grad_(lesson.heads_first == 0)
    for step, (pixels, classes, shares) in enumerate(_ahead(drawn, lesson.steps)):
        if step == lesson.heads_first:
            tower.requires_grad_(True)
        seen = features(tower, pixels)
        loss = _class_loss(head(seen), classes, shares) + CODE_WEIGHT * _code_loss(code(seen), classes, shares).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 250 == 0 or step == lesson.steps - 1:
            spent = time.perf_counter() - started
            scores = "; ".join(_score(tower, head, code, *test) for test in tests)
            print(f"tower {step:5d} {spent:.0f} s, loss {loss.item():.3f}, held-out {scores}", flush=True)
    with torch.no_grad():
        size = features(tower, tests[0][0]).square().mean().sqrt().item()
    model.encoder.layers = every_layer
    rescale(tower, FEATURE_RMS / size)
    tower.half().save_pretrained(directory)
    write_preprocessor(directory, kind)


def _class_loss(scores: Tensor, classes: Tensor, shares: Tensor) -> Tensor:
    """Return the cross entropy against a cell's character and, with a lower weight, blank for the rest of the cell."""
    log = scores.log_softmax(-1)
    expected = shares * log.gather(-1, classes[..., None])[..., 0] + 0.3 * (1 - shares) * log[..., BLANK]
    return -(expected * torch.where(classes == BLANK, 0.3, 1.0)).mean() * 2


def _code_loss(codes: Tensor, classes: Tensor, shares: Tensor) -> Tensor:
    """Return the squared error of each cell's code: its share at its character's index, zero elsewhere."""
    expected = nn.functional.one_hot(classes, BLANK + 1)[..., :BLANK] * shares[..., None]
    return (codes - expected).square().sum(-1)


def write_preprocessor(directory: Path, kind: Kind) -> None:
    """Write `preprocessor_config.json` as the tower's is, without transformers, whose versions write different files."""
    settings = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": kind.eye.mean,
        "image_std": kind.eye.std,
        "resample": 3,
        "rescale_factor": 1 / 255,
        **kind.image_processor,
    }
    text = json.dumps(settings, indent=2, sort_keys=True)
    (directory / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")


def _held_out(draw: Callable[[Random], Page], eye: Eye, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pages that are not trained on."""
    pages = [draw(Random(f"held out/{FIRST.seed}/{n}")) for n in range(count)]
    rng = np.random.default_rng([FIRST.seed, 1, 1])
    pixels = np.stack([colour_page(np.asarray(mask), box, rng, eye) for mask, _, box in pages])
    return torch.from_numpy(pixels), *targets([lines for _, lines, _ in pages])


@torch.no_grad()
def _score(tower: Tower, head: nn.Linear, code: nn.Linear, pixels: Tensor, classes: Tensor, shares: Tensor) -> str:
    """Format the accuracy on cells that clearly contain a character and on empty cells, and the codes' error."""
    seen = features(tower, pixels)
    right, filled, clear = head(seen).argmax(-1) == classes, classes != BLANK, (classes != BLANK) & (shares > CLEAR)
    error = _code_loss(code(seen), classes, shares)
    return (
        f"{right[clear].float().mean():.4f} of characters, {right[~filled].float().mean():.4f} of blanks, "
        f"code errors {error[filled].mean():.4f} and {error[~filled].mean():.4f}"
    )
