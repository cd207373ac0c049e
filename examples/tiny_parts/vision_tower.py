"""Makes the tiny CLIP vision tower: it learns which character stands in each patch of a page of random text.

The losses sit on hidden state -2, the one LLaVA reads; the last layer is ballast, as it is in CLIP for LLaVA. One loss
asks that a linear head tells the characters apart, the other that a linear map gives each its code. The first alone
leaves features that no projector can turn into embeddings: only the softmax after the head made them sharp.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import torch
from grid import BLANK, CELL, SIDE
from optimizers import make_optimizers
from pages import MEAN, PIXELS, STD, Page, colour_page, layout_page, letter_page, random_page, shift_page, targets
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

HIDDEN, HEADS, LAYERS, MLP = 192, 8, 3, 1024
_RING = ((-1, -1), (0, -1), (1, -1), (-1, 0), (1, 0), (-1, 1), (0, 1), (1, 1))
_CROSS = ((-2, 0), (-1, 0), (1, 0), (2, 0), (0, -2), (0, -1), (0, 1), (0, 2))
NEIGHBOURS = (_RING, _CROSS, _RING)
"""Where the heads of each layer look to begin with, in patches."""
PLACE, OWN, STRAIGHT, CORNER = 17, 63, 20, 8
"""How many of a patch's 192 numbers begin as its place, as its own coarsest patterns, as those of the near part of each
of its four straight neighbours, and of its four diagonal ones."""
EASY, PLAIN = 0.04, 0.01
"""Shares of the steps with pages of single letters, and, among them, in black on white."""
CODE_WEIGHT = 10.0
"""Weight of the squared error of the cells' codes: what the projector can make of the features is linear."""
CLEAR = 0.9
"""Share from which a cell counts as holding its character."""
FEATURE_RMS = 1.0
"""Size that hidden state -2 is scaled to, exactly and at the end, so that a fresh `nn.Linear` suits it."""


def _waves(axis: Tensor) -> Tensor:
    """Sine and cosine of four frequencies: their inner product is 4 at equal places, and less at all others."""
    angles = axis[:, None] * torch.tensor([1.0, 3.0, 5.0, 7.0]) * torch.pi / 8
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def _shift(offset: int) -> Tensor:
    """The rotation that moves `_waves` by an offset."""
    angles = torch.tensor([1.0, 3.0, 5.0, 7.0]) * torch.pi / 8 * offset
    cos, sin = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.cat((torch.cat((cos, sin), 1), torch.cat((-sin, cos), 1)))


def _cosines(count: int, height: int = CELL, width: int = CELL) -> Tensor:
    """The coarsest cosine patterns of a rectangle, the finer ones stronger, as letters are made of edges."""

    def waves(size: int) -> Tensor:
        pixel = torch.arange(size, dtype=torch.float32)
        base = torch.cos(torch.pi / size * (pixel[None] + 0.5) * pixel[:, None]) * (2 / size) ** 0.5
        base[0] /= 2**0.5
        return base

    patterns = torch.einsum("uy,vx->uvyx", waves(height), waves(width)).reshape(-1, height, width)
    down, across = torch.arange(height)[:, None] / height, torch.arange(width)[None] / width
    fineness = CELL * (down**2 + across**2).sqrt().reshape(-1)
    strength = 0.28 * (1 + fineness.clamp(max=4))
    strength[0] *= 0.5
    order = fineness.argsort(stable=True)[:count]
    return patterns[order] * strength[order, None, None]


@torch.no_grad()
def start_like_a_convolution(tower: CLIPVisionModel) -> None:
    """Let the eight heads look at eight neighbours of a patch, to begin with (after ConViT, arXiv 2103.10697).

    A patch starts as its place, a constant, and its own coarsest patterns; the first layer brings those of the part of
    each neighbour that touches it. Attention is six eighths of a full match below zero everywhere, so that a nearly
    right place with strong contrast does not beat the right one.
    """
    model = tower.vision_model if hasattr(tower, "vision_model") else tower
    places = torch.arange(SIDE, dtype=torch.float32)
    position = model.embeddings.position_embedding.weight
    position.zero_()
    position[1:, :16] = torch.cat((_waves(places).repeat(SIDE, 1), _waves(places).repeat_interleave(SIDE, 0)), dim=1)
    position[1:, 16] = 1.0
    model.embeddings.class_embedding[:PLACE] = 0
    patches = model.embeddings.patch_embedding.weight
    nn.init.normal_(patches, std=0.03 / (3 * CELL * CELL) ** 0.5)
    patches[:PLACE] = 0
    own = _cosines(OWN)
    patches[PLACE : PLACE + OWN] += own[:, None] / 3
    size, free = HIDDEN // HEADS, PLACE + OWN
    for number, layer in enumerate(model.encoder.layers):
        attention, sharpness = layer.self_attn, 3.0 if number == 0 else 5.0
        attention.out_proj.weight[:PLACE] = 0
        layer.mlp.fc2.weight[:PLACE] = 0
        attention.q_proj.weight.mul_(0.2)
        attention.k_proj.weight.mul_(0.2)
        if number > 0:
            nn.init.normal_(attention.v_proj.weight, std=HIDDEN**-0.5)
        for head, (dx, dy) in enumerate(NEIGHBOURS[number]):
            start = size * head
            query, key = (linear.weight[start : start + PLACE] for linear in (attention.q_proj, attention.k_proj))
            query[:], key[:] = 0, 0
            query[:16, :16] = sharpness * torch.block_diag(_shift(dx), _shift(dy))
            query[16, 16] = -6 * sharpness
            key[:, :PLACE] = sharpness * torch.eye(PLACE)
            if number == 0:
                count = CORNER if dx and dy else STRAIGHT
                value, out = attention.v_proj.weight[start : start + size], attention.out_proj.weight
                value.mul_(0.1)
                value[:count, PLACE : PLACE + OWN] += _near_part(count, dx, dy, own)
                out[:, start : start + size].mul_(0.3)
                out[free : free + count, start : start + count] += torch.eye(count)
                free += count


def _near_part(count: int, dx: int, dy: int, own: Tensor) -> Tensor:
    """The coarsest patterns of the six rows and columns nearest to us, as sums of the patch's own patterns.

    Returns:
        Shape (count, patterns of the patch).
    """
    near = {-1: slice(CELL - 6, CELL), 0: slice(0, CELL), 1: slice(0, 6)}
    part = torch.zeros(count, CELL, CELL)
    part[:, near[dy], near[dx]] = _cosines(count, 6 if dy else CELL, 6 if dx else CELL)
    flat = own.flatten(1)
    return part.flatten(1) @ flat.T / flat.square().sum(1)


@torch.no_grad()
def rescale(tower: CLIPVisionModel, factor: float) -> None:
    """Multiply every hidden state by a factor; what the tower computes stays the same."""
    model = tower.vision_model if hasattr(tower, "vision_model") else tower
    model.pre_layrnorm.weight.mul_(factor)
    model.pre_layrnorm.bias.mul_(factor)
    for layer in model.encoder.layers:
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            linear.weight.mul_(factor)
            linear.bias.mul_(factor)


def features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """The output of the last layer but one without the class token: LLaVA's hidden state -2."""
    return tower(pixels, output_hidden_states=True).hidden_states[LAYERS - 1][:, 1:]


class Pages:
    """The pages in the order they are learnt from: single letters first, then the others over and over.

    Args:
        easy: How many pages of single letters.
        full: How many others; whenever one is used it is coloured anew and moved by up to nine pixels.
        seed: Of all.
    """

    def __init__(self, easy: int, full: int, seed: int) -> None:
        self.easy, self.seed = easy, seed
        self.pages = [_pixels(letter_page(Random(f"letters/{seed}/{n}"), n / easy)) for n in range(easy)]
        self.pages += [_pixels(random_page(Random(f"page/{seed}/{n}"))) for n in range(full)]

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


def _ahead(pages: Pages, steps: int, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The batches, each made while the one before it is learnt from."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(pages.batch, 0, size, plain=True)
        for step in range(1, steps + 1):
            ready = coming.result()
            if step < steps:
                coming = pool.submit(pages.batch, step, size, plain=step < PLAIN * steps)
            yield ready


def make_vision_tower(
    directory: Path, *, pages: int, steps: int, batch: int, rate: float, seed: int
) -> tuple[nn.Linear, nn.Linear]:
    """Train the tower and write it as a Hugging Face folder.

    Args:
        directory: Where `config.json`, `model.safetensors` and `preprocessor_config.json` go.
        pages: How many pages of random text are drawn.
        steps: Optimizer steps.
        batch: Pages a step.
        rate: Highest learning rate.
        seed: Of everything.

    Returns:
        The two heads that the tower learnt with: scores of the classes, and codes. Neither is part of the tower.
    """
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        image_size=PIXELS, patch_size=CELL, projection_dim=HIDDEN, layer_norm_eps=1e-5,
    )  # fmt: skip
    tower = CLIPVisionModel(config)
    start_like_a_convolution(tower)
    model = tower.vision_model if hasattr(tower, "vision_model") else tower
    every_layer = model.encoder.layers
    model.encoder.layers = every_layer[:-1]  # the last one is never read: save its time
    head, code = nn.Linear(HIDDEN, BLANK + 1), nn.Linear(HIDDEN, BLANK)
    for parameter in code.parameters():
        nn.init.zeros_(parameter)  # features start out large: random codes would be far off, and all there is to learn
    started = time.perf_counter()
    drawn = Pages(max(1, round(EASY * steps)) * batch, pages, seed)
    tests = [_held_out(kind, seed) for kind in (random_page, layout_page)]
    print(f"{len(drawn.pages)} pages drawn in {time.perf_counter() - started:.0f} s", flush=True)
    parameters = [*tower.parameters(), *head.parameters(), *code.parameters()]
    optimizers, schedules = make_optimizers(
        model.encoder.layers, parameters, rate, steps, model.embeddings.parameters()
    )
    for step, (pixels, classes, shares) in enumerate(_ahead(drawn, steps, batch)):
        seen = features(tower, pixels)
        loss = _class_loss(head(seen), classes, shares) + CODE_WEIGHT * _code_loss(code(seen), classes, shares).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 250 == 0 or step == steps - 1:
            spent = time.perf_counter() - started
            scores = "; ".join(_score(tower, head, code, *test) for test in tests)
            print(f"tower {step:5d} {spent:.0f} s, loss {loss.item():.3f}, held-out {scores}", flush=True)
    with torch.no_grad():
        size = features(tower, tests[0][0]).square().mean().sqrt().item()
    model.encoder.layers = every_layer
    rescale(tower, FEATURE_RMS / size)
    tower.half().save_pretrained(directory)
    write_preprocessor(directory)
    return head, code


def _class_loss(scores: Tensor, classes: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy against a cell's character and, for the rest of it, blank, which counts less."""
    log = scores.log_softmax(-1)
    wanted = shares * log.gather(-1, classes[..., None])[..., 0] + 0.3 * (1 - shares) * log[..., BLANK]
    return -(wanted * torch.where(classes == BLANK, 0.3, 1.0)).mean() * 2


def _code_loss(codes: Tensor, classes: Tensor, shares: Tensor) -> Tensor:
    """Squared distance of each cell from its code: its share at its character's place, zero elsewhere."""
    wanted = nn.functional.one_hot(classes, BLANK + 1)[..., :BLANK] * shares[..., None]
    return (codes - wanted).square().sum(-1)


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


def _held_out(draw: object, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """96 pages that are not learnt from."""
    assert callable(draw)
    pages = [draw(Random(f"held out/{seed}/{n}")) for n in range(96)]
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
