"""The initialization of the tiny vision towers, and the rescaling of their hidden states."""

import torch
from grid import SIDE
from torch import Tensor, nn
from transformers import CLIPVisionModel, SiglipVisionModel

HIDDEN, HEADS = 192, 8
_RING = ((-1, -1), (0, -1), (1, -1), (-1, 0), (1, 0), (-1, 1), (0, 1), (1, 1))
_CROSS = ((-2, 0), (-1, 0), (1, 0), (2, 0), (0, -2), (0, -1), (0, 1), (0, 2))
NEIGHBOURS = (_RING, _CROSS, _RING)
"""Offsets, in patches, that the heads of each layer attend to at initialization."""
PLACE, OWN, STRAIGHT, CORNER = 17, 63, 20, 8
"""Numbers of a patch's 192 features that are initialized with its position, with its own coarsest patterns, with those
of the near part of each of its four straight neighbors, and of each of its four diagonal neighbors."""


def body(tower: CLIPVisionModel | SiglipVisionModel) -> nn.Module:
    """Return the module with the embeddings and layers, which is nested one level deeper in older transformers."""
    return tower.vision_model if hasattr(tower, "vision_model") else tower


def _waves(axis: Tensor) -> Tensor:
    """Return sine and cosine of four frequencies; their inner product is 4 at equal positions, and less elsewhere."""
    angles = axis[:, None] * torch.tensor([1.0, 3.0, 5.0, 7.0]) * torch.pi / 8
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def _shift(offset: int) -> Tensor:
    """Return the rotation that moves `_waves` by an offset."""
    angles = torch.tensor([1.0, 3.0, 5.0, 7.0]) * torch.pi / 8 * offset
    cos, sin = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.cat((torch.cat((cos, sin), 1), torch.cat((-sin, cos), 1)))


def _cosines(count: int, height: int, width: int, cell: int) -> Tensor:
    """Return the coarsest cosine patterns of a rectangle, finer ones scaled up because letters consist of edges."""

    def waves(size: int) -> Tensor:
        pixel = torch.arange(size, dtype=torch.float32)
        base = torch.cos(torch.pi / size * (pixel[None] + 0.5) * pixel[:, None]) * (2 / size) ** 0.5
        base[0] /= 2**0.5
        return base

    patterns = torch.einsum("uy,vx->uvyx", waves(height), waves(width)).reshape(-1, height, width)
    down, across = torch.arange(height)[:, None] / height, torch.arange(width)[None] / width
    fineness = cell * (down**2 + across**2).sqrt().reshape(-1)
    strength = 0.28 * (1 + fineness.clamp(max=4))
    strength[0] *= 0.5
    order = fineness.argsort(stable=True)[:count]
    return patterns[order] * strength[order, None, None]


@torch.no_grad()
def start_like_a_convolution(tower: CLIPVisionModel | SiglipVisionModel) -> None:
    """Initialize the eight heads to attend to eight neighbors of a patch (after ConViT, arXiv 2103.10697).

    A patch's features start as its position, a constant, and its own coarsest patterns; the first layer adds those of
    the adjacent part of each neighbor. The constant lowers all attention scores by six eighths of a full match, so that
    a nearly matching position with strong contrast does not outweigh the matching one.
    """
    model = body(tower)
    places = torch.arange(SIDE, dtype=torch.float32)
    position = model.embeddings.position_embedding.weight
    position.zero_()
    position = position[-SIDE * SIDE :]  # without the class token's
    position[:, :16] = torch.cat((_waves(places).repeat(SIDE, 1), _waves(places).repeat_interleave(SIDE, 0)), dim=1)
    position[:, 16] = 1.0
    if isinstance(tower, CLIPVisionModel):
        model.embeddings.class_embedding[:PLACE] = 0
    patches = model.embeddings.patch_embedding.weight
    cell = patches.shape[-1]
    nn.init.normal_(patches, std=0.03 / (3 * cell * cell) ** 0.5)
    patches[:PLACE] = 0
    own = _cosines(OWN, cell, cell, cell)
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
    """Return the coarsest patterns of a neighbor's nearest rows and columns, six of ten, as sums of its own patterns.

    Returns:
        Shape (count, patterns of the patch).
    """
    cell = own.shape[-1]
    some = round(0.6 * cell)
    near = {-1: slice(cell - some, cell), 0: slice(0, cell), 1: slice(0, some)}
    part = torch.zeros(count, cell, cell)
    part[:, near[dy], near[dx]] = _cosines(count, some if dy else cell, some if dx else cell, cell)
    flat = own.flatten(1)
    return part.flatten(1) @ flat.T / flat.square().sum(1)


@torch.no_grad()
def rescale(tower: CLIPVisionModel | SiglipVisionModel, factor: float) -> None:
    """Multiply every hidden state by a factor, without changing what the tower computes otherwise."""
    model = body(tower)
    if isinstance(tower, CLIPVisionModel):
        model.pre_layrnorm.weight.mul_(factor)
        model.pre_layrnorm.bias.mul_(factor)
    else:
        for parameter in model.embeddings.parameters():
            parameter.mul_(factor)
    for layer in model.encoder.layers:
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            linear.weight.mul_(factor)
            linear.bias.mul_(factor)
