"""Makes the tiny CLIP vision tower: it learns which character stands in each patch of a page of random text.

The losses sit on hidden state -2, the one LLaVA reads; the last layer is ballast, as it is in CLIP for LLaVA. One loss
asks that a linear head tells the characters apart, the other that a linear map gives each its code. The first alone
leaves features that no projector can turn into embeddings: only the softmax after the head made them sharp.
"""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from grid import BLANK, CELL
from optimizers import make_optimizers
from pages import MEAN, PIXELS, STD, Page, colour_page, layout_page, letter_page, random_page, shift_page, targets
from torch import Tensor, nn
from tower_start import HEADS, HIDDEN, body, rescale, start_like_a_convolution
from transformers import CLIPVisionConfig, CLIPVisionModel

LAYERS, MLP = 3, 1024
PLAIN = 0.25
"""Share of the pages of single letters that come in black on white."""
CODE_WEIGHT = 10.0
"""Weight of the squared error of the cells' codes: what the projector can make of the features is linear."""
CLEAR = 0.9
"""Share from which a cell counts as holding its character."""
FEATURE_RMS = 1.0
"""Size that hidden state -2 is scaled to, exactly and at the end, so that a fresh `nn.Linear` suits it."""


def features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """The output of the last layer but one without the class token: LLaVA's hidden state -2."""
    return tower(pixels, output_hidden_states=True).hidden_states[LAYERS - 1][:, 1:]


@dataclass(frozen=True)
class Lesson:
    """One pass over pages.

    Args:
        pages: How many pages of random text are drawn.
        steps: Optimizer steps.
        rate: Highest learning rate.
        easy: Share of the steps with pages of single letters.
        layouts: Share of the other pages that are laid out as the quickstart's images are.
        heads_first: Steps in which the heads alone learn.
        seed: Of the pages and of all draws.
    """

    pages: int
    steps: int
    rate: float
    easy: float
    layouts: float
    heads_first: int
    seed: int

    def scaled(self, scale: float) -> "Lesson":
        """The same lesson with a share of the steps and pages, for a trial."""
        sizes = {"pages": max(32, round(self.pages * scale)), "steps": max(2, round(self.steps * scale))}
        return replace(self, **sizes, heads_first=round(self.heads_first * scale))


FIRST = Lesson(pages=12000, steps=7500, rate=5e-3, easy=0.04, layouts=0.35, heads_first=0, seed=0)
LESSONS = (
    FIRST,
    Lesson(pages=12000, steps=6000, rate=2.5e-3, easy=0, layouts=0.7, heads_first=200, seed=1),
    Lesson(pages=12000, steps=4500, rate=2.5e-3, easy=0, layouts=0.9, heads_first=200, seed=2),
)
"""Each starts from the file of the one before it, and can be repeated by itself."""
BATCH = 16
HELD_OUT = 96


class Pages:
    """The pages in the order they are learnt from: single letters first, then the others over and over.

    Args:
        easy: How many pages of single letters.
        lesson: Says how many others; whenever one is used it is coloured anew and moved by up to nine pixels.
    """

    def __init__(self, easy: int, lesson: Lesson) -> None:
        self.easy, self.seed, layouts, name = easy, lesson.seed, lesson.layouts, f"page/{lesson.seed}"
        self.pages = [_pixels(letter_page(Random(f"letters/{self.seed}/{n}"), n / easy)) for n in range(easy)]
        self.pages += [_pixels(random_page(Random(f"{name}/{n}"), layouts)) for n in range(lesson.pages)]

    def batch(self, step: int, size: int, *, plain: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels, classes and shares of a step's pages."""
        rng, images, texts = np.random.default_rng([self.seed, step]), [], []
        for n in range(step * size, (step + 1) * size):
            page = self.pages[n] if n < self.easy else self.pages[self._drawn(n - self.easy)]
            if n >= self.easy:
                page = shift_page(*page, *rng.integers(-9, 10, 2).tolist())
            images.append(colour_page(page[0], page[2], rng, plain=plain))
            texts.append(page[1])
        return torch.from_numpy(np.stack(images)), *targets(texts)

    def _drawn(self, n: int) -> int:
        epoch, place = divmod(n, len(self.pages) - self.easy)
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.pages) - self.easy)
        return self.easy + int(order[place])


def _pixels(page: Page) -> tuple[np.ndarray, list[list[tuple[str, float, float]]], tuple[float, float, float, float]]:
    return np.asarray(page[0]), page[1], page[2]


def _ahead(pages: Pages, steps: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The batches, each made while the one before it is learnt from."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(pages.batch, 0, BATCH, plain=pages.easy > 0)
        for step in range(1, steps + 1):
            ready = coming.result()
            if step < steps:
                coming = pool.submit(pages.batch, step, BATCH, plain=step * BATCH < PLAIN * pages.easy)
            yield ready


def make_vision_tower(directory: Path, lessons: Sequence[Lesson] = LESSONS) -> None:
    """Train the tower and write it as a Hugging Face folder.

    Args:
        directory: Where `config.json`, `model.safetensors` and `preprocessor_config.json` go. What each lesson but the
            last wrote is kept in a folder beside it.
        lessons: In their order; the first is from nothing.
    """
    torch.manual_seed(lessons[0].seed)
    config = CLIPVisionConfig(
        hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        image_size=PIXELS, patch_size=CELL, projection_dim=HIDDEN, layer_norm_eps=1e-5,
    )  # fmt: skip
    tower = CLIPVisionModel(config)
    start_like_a_convolution(tower)
    names = [*(f"{directory.name}_lesson_{number}" for number in range(1, len(lessons))), directory.name]
    for number, (lesson, name) in enumerate(zip(lessons, names, strict=True)):
        if number > 0:
            torch.manual_seed(lesson.seed)
            tower = CLIPVisionModel.from_pretrained(directory.with_name(names[number - 1]), dtype=torch.float32)
        teach(tower, lesson, directory.with_name(name))


def teach(tower: CLIPVisionModel, lesson: Lesson, directory: Path) -> None:
    """Train a tower on a lesson's pages and write it."""
    model = body(tower)
    every_layer = model.encoder.layers
    model.encoder.layers = every_layer[:-1]  # the last one is never read: save its time
    head, code = nn.Linear(HIDDEN, BLANK + 1), nn.Linear(HIDDEN, BLANK)
    for parameter in code.parameters():
        nn.init.zeros_(parameter)  # features start out large: random codes would be far off, and all there is to learn
    started = time.perf_counter()
    drawn = Pages(round(lesson.easy * lesson.steps) * BATCH, lesson)
    tests = [_held_out(kind, FIRST.seed, min(HELD_OUT, lesson.pages // 2)) for kind in (random_page, layout_page)]
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
    write_preprocessor(directory)


def _class_loss(scores: Tensor, classes: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy against a cell's character and, for the rest of it, blank, which counts less."""
    log = scores.log_softmax(-1)
    expected = shares * log.gather(-1, classes[..., None])[..., 0] + 0.3 * (1 - shares) * log[..., BLANK]
    return -(expected * torch.where(classes == BLANK, 0.3, 1.0)).mean() * 2


def _code_loss(codes: Tensor, classes: Tensor, shares: Tensor) -> Tensor:
    """Squared distance of each cell from its code: its share at its character's place, zero elsewhere."""
    expected = nn.functional.one_hot(classes, BLANK + 1)[..., :BLANK] * shares[..., None]
    return (codes - expected).square().sum(-1)


def write_preprocessor(directory: Path) -> None:
    """Write `preprocessor_config.json` as CLIP's are; by hand, as the libraries' versions write different ones."""
    settings = {
        "crop_size": {"height": PIXELS, "width": PIXELS},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": STD,
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": PIXELS},
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _held_out(draw: object, seed: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pages that are not learnt from."""
    assert callable(draw)
    pages = [draw(Random(f"held out/{seed}/{n}")) for n in range(count)]
    rng = np.random.default_rng([seed, 1, 1])
    pixels = np.stack([colour_page(np.asarray(mask), box, rng) for mask, _, box in pages])
    return torch.from_numpy(pixels), *targets([lines for _, lines, _ in pages])


@torch.no_grad()
def _score(
    tower: CLIPVisionModel, head: nn.Linear, code: nn.Linear, pixels: Tensor, classes: Tensor, shares: Tensor
) -> str:
    """Shares of right cells among those that clearly hold a character and among the empty ones; error of the codes."""
    seen = features(tower, pixels)
    right, filled, clear = head(seen).argmax(-1) == classes, classes != BLANK, (classes != BLANK) & (shares > CLEAR)
    error = _code_loss(code(seen), classes, shares)
    return (
        f"{right[clear].float().mean():.4f} of characters, {right[~filled].float().mean():.4f} of blanks, "
        f"codes off by {error[filled].mean():.4f} and {error[~filled].mean():.4f}"
    )
