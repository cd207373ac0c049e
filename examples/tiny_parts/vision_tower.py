"""Makes the tiny CLIP vision tower: it learns which character stands in each patch of a page of random text.

The loss sits on hidden state -2, the one LLaVA reads; the last layer is ballast, as it is in CLIP for LLaVA.
"""

import json
import time
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import TypeAlias

import numpy as np
import torch
from grid import BLANK, CELL, SIDE, fill_cells
from optimizers import make_optimizers
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModel

from llavar_peft.data.fonts import CAP_HEIGHT, load_font
from llavar_peft.data.layouts import CAPITALS, DIGITS, KINDS, draw_layout

PIXELS = SIDE * CELL
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR = (122, 116, 104)
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono-Bold", "DejaVuSerif-Bold")
HIDDEN, HEADS, LAYERS, MLP = 192, 8, 4, 384
_RING = ((-1, -1), (0, -1), (1, -1), (-1, 0), (1, 0), (-1, 1), (0, 1), (1, 1))
_CROSS = ((-2, 0), (-1, 0), (1, 0), (2, 0), (0, -2), (0, -1), (0, 1), (0, 2))
NEIGHBOURS = (_RING, _CROSS, _RING, _RING)
"""Where the heads of each layer look to begin with, in patches."""
EASY, PLAIN = 0.15, 0.03
"""Shares of the steps with pages of single letters, and, among them, in black on white."""
FEATURE_RMS = 1.0
"""Size that hidden state -2 is scaled to, exactly and at the end, so that a fresh `nn.Linear` suits it."""


def random_text(rng: Random) -> str:
    """One word or number of the kinds that stand on signs, covers and receipts."""
    draw = rng.random()
    if draw < 0.6:
        return "".join(rng.choices(CAPITALS, k=rng.randint(2, 8)))
    if draw < 0.8:
        return "".join(rng.choices(DIGITS, k=rng.randint(1, 5)))
    return f"{rng.randrange(100)}{rng.choice('..:')}{rng.randrange(100):02d}"


def _font(rng: Random, size: int) -> ImageFont.FreeTypeFont:
    """A packaged face, or now and then the one that Pillow brings along."""
    if rng.random() < 0.14:
        face = ImageFont.load_default(size)
        if isinstance(face, ImageFont.FreeTypeFont):
            return face
    return load_font(rng.choice(FONTS), size)


Page: TypeAlias = tuple[Image.Image, list[int], tuple[float, float, float, float]]


def random_page(rng: Random) -> Page:
    """Draw white on black text: a sign, cover, poster or receipt of random words, or a page full of them.

    Returns:
        The coverage of each of the 120 x 120 pixels, the classes of the cells, and the page's box in pixels (what lies
        outside is padding).
    """
    return layout_page(rng) if rng.random() < 0.4 else dense_page(rng)


def layout_page(rng: Random) -> Page:
    """Draw one of the layouts that the pictures have, of other strings."""
    layout = draw_layout(rng.choice(KINDS), rng, shortest=200, longest=400)
    side = max(layout.width, layout.height)
    left, top = (side - layout.width) / 2, (side - layout.height) / 2
    canvas = Image.new("L", (layout.width, layout.height))
    pen = ImageDraw.Draw(canvas)
    for line in layout.lines:
        pen.text((line.left, line.baseline), line.text, 255, load_font(line.font, line.size), anchor="ls")
    square = Image.new("L", (side, side))
    square.paste(canvas, ((side - layout.width) // 2, (side - layout.height) // 2))
    cells = fill_cells(
        [(c, (x + left) / side * SIDE, (y + top) / side * SIDE) for c, x, y in line.centres()] for line in layout.lines
    )
    scale = PIXELS / side
    box = (left * scale, top * scale, (left + layout.width) * scale, (top + layout.height) * scale)
    return square.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC), cells, box


def dense_page(rng: Random) -> Page:
    """Fill a page with lines at free places and sizes."""
    over = rng.uniform(1.5, 3.2)
    unit = over * PIXELS
    aspect = rng.uniform(0.5, 1.0) if rng.random() < 0.6 else 1.0
    width, height = (unit, unit * aspect) if rng.random() < 0.65 else (unit * aspect, unit)
    canvas = Image.new("L", (round(unit),) * 2)
    pen = ImageDraw.Draw(canvas)
    left, top = (unit - width) / 2, (unit - height) / 2
    lines: list[list[tuple[str, float, float]]] = []
    y = top + rng.uniform(0, CELL) * over
    while True:
        text = " ".join(random_text(rng) for _ in range(5))
        face = _font(rng, 100)
        pitch = face.getlength(text) / len(text) / 100
        larger = rng.uniform(1, 2.2) if rng.random() < 0.15 else rng.uniform(1, 1.35)
        size = round(CELL * max(1.28, 0.99 / pitch) * over * larger)
        y += size * rng.uniform(1.0, 1.2)
        if y > top + height:
            break
        face = face.font_variant(size=size)
        x = left + rng.uniform(0.0, 0.06) * width
        while face.getlength(text) + x - left > width * 0.98 and len(text) > 1:
            text = text[:-1].rstrip()
        x += rng.uniform(0, max(0, width * 0.99 - face.getlength(text) - (x - left)))
        pen.text((round(x), round(y)), text, 255, face, anchor="ls")
        ends = [round(x) + face.getlength(text[:n]) for n in range(len(text) + 1)]
        centre = round(y) - CAP_HEIGHT * size / 2
        middles = [(start + end) / 2 for start, end in pairwise(ends)]
        lines.append([(c, m / over / CELL, centre / over / CELL) for c, m in zip(text, middles, strict=True)])
    box = (left / over, top / over, (left + width) / over, (top + height) / over)
    return canvas.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC), fill_cells(lines), box


def letter_page(rng: Random, freedom: float) -> Page:
    """Fill a page with rows of single letters, the easier kind: at `freedom` 0 each stands in the middle of a cell.

    Args:
        rng: Where every choice comes from.
        freedom: From 0 to 1: how far places and sizes may leave the grid.
    """
    over = rng.uniform(1.5, 2.5)
    unit = over * CELL
    canvas = Image.new("L", (round(unit * SIDE), round(unit * SIDE)))
    pen = ImageDraw.Draw(canvas)
    lines: list[list[tuple[str, float, float]]] = []
    y = 0.5 + freedom * rng.uniform(-0.5, 0.5)
    while y < SIDE - 0.3:
        pitch = 1 + freedom * rng.uniform(0, 0.45)
        x = 0.5 + freedom * rng.uniform(-0.2, 0.8)
        size = rng.uniform(1.25, 1.35 + 0.5 * freedom)
        face = _font(rng, round(size * unit))
        text = "".join(random_text(rng) for _ in range(8))
        spots: list[tuple[str, float, float]] = []
        for character in text:
            if x > SIDE - 0.3:
                break
            pen.text((x * unit, y * unit + CAP_HEIGHT * size * unit / 2), character, 255, face, anchor="ms")
            spots.append((character, x, y))
            x += max(pitch, face.getlength(character) / unit * 1.02)
        lines.append(spots)
        y += max(size * 0.95, 1.0 + freedom * rng.uniform(0, 0.8)) if freedom > 0.05 else rng.choice((1, 2))
    canvas = canvas.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)
    return canvas, fill_cells(lines), (0.0, 0.0, float(PIXELS), float(PIXELS))


def colour_pages(masks: np.ndarray, boxes: np.ndarray, rng: np.random.Generator, *, plain: bool = False) -> Tensor:
    """Give pages a background, an ink and padding, and normalise them as CLIP does."""
    count = len(masks)
    back, ink = np.zeros((count, 3), np.float32), np.zeros((count, 3), np.float32)
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    for n in range(count):
        while abs((back[n] - ink[n]) @ luma) < 95:
            back[n], ink[n] = rng.uniform(0, 255, 3), rng.uniform(0, 255, 3)
            if rng.random() < 0.35:
                back[n], ink[n] = (rng.uniform(235, 255), rng.uniform(0, 35))[:: rng.choice((1, -1))]
    if plain:
        back[:], ink[:] = 255, 0
    cover = masks[:, None].astype(np.float32) / 255
    pages = back[:, :, None, None] * (1 - cover) + ink[:, :, None, None] * cover
    if rng.random() < 0.5:
        pages += rng.normal(0, rng.uniform(0, 8), pages.shape)
    axis = np.arange(PIXELS) + 0.5
    for n, (left, top, right, bottom) in enumerate(boxes):
        inside = ((axis > top) & (axis < bottom))[:, None] & ((axis > left) & (axis < right))[None]
        pages[n] = np.where(inside, pages[n], np.array(PAD_COLOUR, np.float32)[:, None, None])
        if rng.random() < 0.2:
            edge = inside & ~(
                ((axis > top + 1.5) & (axis < bottom - 1.5))[:, None]
                & ((axis > left + 1.5) & (axis < right - 1.5))[None]
            )
            pages[n] = np.where(edge, ink[n][:, None, None], pages[n])
    pages = np.clip(np.round(pages), 0, 255) / 255
    pages = (pages - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    return torch.from_numpy(pages.astype(np.float32))


def _waves(axis: Tensor) -> Tensor:
    """Sine and cosine of four frequencies: their inner product is 4 at equal places and 0 at all others within 7."""
    angles = axis[:, None] * torch.tensor([1.0, 3.0, 5.0, 7.0]) * torch.pi / 8
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def _shift(offset: int) -> Tensor:
    """The rotation that moves `_waves` by an offset."""
    angles = torch.tensor([1.0, 3.0, 5.0, 7.0]) * torch.pi / 8 * offset
    cos, sin = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.cat((torch.cat((cos, sin), 1), torch.cat((-sin, cos), 1)))


def _cosines(count: int) -> Tensor:
    """The coarsest cosine patterns of a patch, the finer ones stronger, as letters are made of edges."""
    pixel = torch.arange(CELL, dtype=torch.float32)
    base = torch.cos(torch.pi / CELL * (pixel[None] + 0.5) * pixel[:, None]) * (2 / CELL) ** 0.5
    base[0] /= 2**0.5
    patterns = torch.einsum("ux,vy->uvxy", base, base).reshape(CELL * CELL, CELL, CELL)
    fineness = (pixel[:, None] ** 2 + pixel[None] ** 2).sqrt().reshape(-1)
    strength = 0.28 * (1 + fineness.clamp(max=4))
    strength[0] *= 0.5
    order = fineness.argsort(stable=True)[:count]
    return patterns[order] * strength[order, None, None]


@torch.no_grad()
def start_like_a_convolution(tower: CLIPVisionModel) -> None:
    """Let the eight heads look at the eight neighbours of a patch, to begin with (after ConViT, arXiv 2103.10697).

    Of the 192 numbers of a patch 16 start as its place, 48 as its own coarsest patterns; into the other 128 the first
    layer brings the 16 coarsest patterns of each neighbour.
    """
    model = tower.vision_model if hasattr(tower, "vision_model") else tower
    places = torch.arange(SIDE, dtype=torch.float32)
    position = model.embeddings.position_embedding.weight
    position.zero_()
    position[1:, :16] = torch.cat((_waves(places).repeat(SIDE, 1), _waves(places).repeat_interleave(SIDE, 0)), dim=1)
    patches = model.embeddings.patch_embedding.weight
    nn.init.normal_(patches, std=0.1 / (3 * CELL * CELL) ** 0.5)
    patches[:16] = 0
    patches[16:64] += _cosines(48)[:, None] / 3
    size = HIDDEN // HEADS
    for number, layer in enumerate(model.encoder.layers):
        attention = layer.self_attn
        attention.q_proj.weight.mul_(0.2)
        attention.k_proj.weight.mul_(0.2)
        for head, (dx, dy) in enumerate(NEIGHBOURS[number]):
            rows = slice(size * head, size * head + 16)
            attention.q_proj.weight[rows, :16] = 1.8 * torch.block_diag(_shift(dx), _shift(dy))
            attention.k_proj.weight[rows, :16] = 1.8 * torch.eye(16)
            if number == 0:
                attention.v_proj.weight[rows].mul_(0.3)
                attention.v_proj.weight[rows, 16:32] += torch.eye(16)
                attention.out_proj.weight[64 + 16 * head : 80 + 16 * head, rows] += torch.eye(16)
            else:
                nn.init.normal_(attention.v_proj.weight, std=HIDDEN**-0.5)


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


def make_vision_tower(directory: Path, *, pages: int, steps: int, batch: int, rate: float, seed: int) -> nn.Linear:
    """Train the tower and write it as a Hugging Face folder.

    Args:
        directory: Where `config.json`, `model.safetensors` and `preprocessor_config.json` go.
        pages: How many pages of random text are drawn; each is coloured anew whenever it is used.
        steps: Optimizer steps.
        batch: Pages a step.
        rate: Highest learning rate.
        seed: Of everything.

    Returns:
        The head that reads characters off the features; it is not part of the tower.
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
    head = nn.Linear(HIDDEN, BLANK + 1)
    started = time.perf_counter()
    easy = round(EASY * steps)
    drawn = [letter_page(Random(f"letters/{seed}/{n}"), n / (easy * batch)) for n in range(easy * batch)]
    drawn += [random_page(Random(f"page/{seed}/{n}")) for n in range(pages + 256)]
    masks = np.stack([np.asarray(mask) for mask, _, _ in drawn])
    labels = torch.tensor([cells for _, cells, _ in drawn])
    boxes = np.array([box for _, _, box in drawn])
    del drawn
    print(f"{len(masks)} pages drawn in {time.perf_counter() - started:.0f} s", flush=True)
    rng = np.random.default_rng(seed)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizers, schedules = make_optimizers(model.encoder.layers, parameters, rate, steps)
    weight = torch.ones(BLANK + 1)
    weight[BLANK] = 0.3
    order = np.arange(easy * batch)
    for step in range(steps):
        if len(order) < batch:
            order = easy * batch + rng.permutation(pages)
        chosen, order = order[:batch], order[batch:]
        logits = head(features(tower, colour_pages(masks[chosen], boxes[chosen], rng, plain=step < PLAIN * steps)))
        loss = functional.cross_entropy(logits.flatten(0, 1), labels[chosen].flatten(), weight)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            right = (logits.argmax(-1) == labels[chosen])[labels[chosen] != BLANK].float().mean()
            spent = time.perf_counter() - started
            held_out = _accuracy(tower, head, masks[-256:], boxes[-256:], labels[-256:])
            print(f"tower {step:5d} {spent:.0f} s, right in training {right:.3f}, held-out", *held_out, flush=True)
    with torch.no_grad():
        size = features(tower, colour_pages(masks[:64], boxes[:64], rng)).square().mean().sqrt().item()
    model.encoder.layers = every_layer
    rescale(tower, FEATURE_RMS / size)
    tower.half().save_pretrained(directory)
    write_preprocessor(directory)
    return head


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


@torch.no_grad()
def _accuracy(
    tower: CLIPVisionModel, head: nn.Linear, masks: np.ndarray, boxes: np.ndarray, labels: Tensor
) -> tuple[str, str]:
    """Share of right cells among those with a character, and among the empty ones, on held-out pages."""
    guess = head(features(tower, colour_pages(masks, boxes, np.random.default_rng(0)))).argmax(-1)
    right, filled = guess == labels, labels != BLANK
    return f"characters {right[filled].float().mean():.4f}", f"blanks {right[~filled].float().mean():.4f}"
