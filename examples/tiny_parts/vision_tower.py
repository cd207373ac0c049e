"""Train the tiny CLIP vision tower to predict the character in each patch of a page of random text.

The losses are applied to hidden state -2, which LLaVA reads; the last layer is unused, as CLIP's is in LLaVA. One loss
trains a linear head to predict the characters, the other a linear map to produce a code for each of them. With the
first loss alone, the characters can only be separated by the softmax after the head, and no projector can turn the
features into embeddings.
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
"""Share of the pages of single letters that are black on white."""
CODE_WEIGHT = 10.0
"""Weight of the squared error of the cells' codes, which makes the features useful to a linear projector."""
CLEAR = 0.9
"""Share from which a cell counts as containing its character."""
FEATURE_RMS = 1.0
"""Root mean square that hidden state -2 is scaled to at the end, to suit a new `nn.Linear`."""


def features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """Return the output of the second to last layer without the class token: LLaVA's hidden state -2."""
    return tower(pixels, output_hidden_states=True).hidden_states[LAYERS - 1][:, 1:]


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
    """

    pages: int
    steps: int
    rate: float
    easy: float
    layouts: float
    heads_first: int
    seed: int

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
BATCH = 16
HELD_OUT = 96


class Pages:
    """The pages in training order: single letters first, then the other pages, repeated.

    Args:
        easy: Number of pages of single letters.
        lesson: Its number of other pages; each use of one has new colors and an offset of up to nine pixels.
    """

    def __init__(self, easy: int, lesson: Lesson) -> None:
        self.easy, self.seed, layouts, name = easy, lesson.seed, lesson.layouts, f"page/{lesson.seed}"
        self.pages = [_pixels(letter_page(Random(f"letters/{self.seed}/{n}"), n / easy)) for n in range(easy)]
        self.pages += [_pixels(random_page(Random(f"{name}/{n}"), layouts)) for n in range(lesson.pages)]

    def batch(self, step: int, size: int, *, plain: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return pixels, classes and shares of a step's pages."""
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
    """Yield the batches, each prepared while the previous one is trained on."""
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
        directory: Folder for `config.json`, `model.safetensors` and `preprocessor_config.json`. The results of all
            lessons but the last are kept in folders next to it.
        lessons: In their order; the first starts from random initialization.
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
    """Train a tower on a lesson's pages and write it to a folder."""
    model = body(tower)
    every_layer = model.encoder.layers
    model.encoder.layers = every_layer[:-1]  # the last layer is unused: save its time
    head, code = nn.Linear(HIDDEN, BLANK + 1), nn.Linear(HIDDEN, BLANK)
    for parameter in code.parameters():
        nn.init.zeros_(parameter)  # with large initial features, random codes would dominate the loss
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
    """Return the cross entropy against a cell's character and, with a lower weight, blank for the rest of the cell."""
    log = scores.log_softmax(-1)
    expected = shares * log.gather(-1, classes[..., None])[..., 0] + 0.3 * (1 - shares) * log[..., BLANK]
    return -(expected * torch.where(classes == BLANK, 0.3, 1.0)).mean() * 2


def _code_loss(codes: Tensor, classes: Tensor, shares: Tensor) -> Tensor:
    """Return the squared error of each cell's code: its share at its character's index, zero elsewhere."""
    expected = nn.functional.one_hot(classes, BLANK + 1)[..., :BLANK] * shares[..., None]
    return (codes - expected).square().sum(-1)


def write_preprocessor(directory: Path) -> None:
    """Write `preprocessor_config.json` as CLIP's is, without transformers, whose versions write different files."""
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
    """Draw pages that are not trained on."""
    assert callable(draw)
    pages = [draw(Random(f"held out/{seed}/{n}")) for n in range(count)]
    rng = np.random.default_rng([seed, 1, 1])
    pixels = np.stack([colour_page(np.asarray(mask), box, rng) for mask, _, box in pages])
    return torch.from_numpy(pixels), *targets([lines for _, lines, _ in pages])


@torch.no_grad()
def _score(
    tower: CLIPVisionModel, head: nn.Linear, code: nn.Linear, pixels: Tensor, classes: Tensor, shares: Tensor
) -> str:
    """Format the accuracy on cells that clearly contain a character and on empty cells, and the codes' error."""
    seen = features(tower, pixels)
    right, filled, clear = head(seen).argmax(-1) == classes, classes != BLANK, (classes != BLANK) & (shares > CLEAR)
    error = _code_loss(code(seen), classes, shares)
    return (
        f"{right[clear].float().mean():.4f} of characters, {right[~filled].float().mean():.4f} of blanks, "
        f"code errors {error[filled].mean():.4f} and {error[~filled].mean():.4f}"
    )
