"""The model and data of ``train.py``: a LLaVAR of random weights, and random records with realistic lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from lengths import TEMPLATE_TOKENS, TURN_TOKENS, draw_turns
from torch.utils.data import Dataset
from transformers import CLIPVisionConfig, LlamaConfig

from llavar_peft import CrossAttention, Tiles
from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.data.tile_layout import TileGeometry, view_count
from llavar_peft.data.training_dataset import Item
from llavar_peft.models.llavar_config import LlavarConfig, make_config
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.types import Example, TileLayout

BOS, EOS, FIRST_WORD = 1, 2, 3
PATCH = 14
IMAGES = 8
"""Number of different images, which the records share."""
Resolution = Tiles | CrossAttention | None


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of a model.

    Attributes:
        hidden: Width of the language model.
        inner: Width of its MLP.
        layers: Number of its layers.
        heads: Number of its attention heads.
        words: Rows of the embeddings, including the image tokens.
        tower: Width of the tower, whose MLP is four times as wide.
        tower_layers: Number of the tower's layers, including the last one, whose output is not used.
        side: Side of an image in pixels.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    words: int
    tower: int
    tower_layers: int
    side: int

    @property
    def image_tokens(self) -> int:
        """Return the number of patches of an image."""
        return (self.side // PATCH) ** 2


SHAPES = {
    "tiny": Shape(32, 64, 2, 2, 100, 16, 3, 28),
    "middle": Shape(384, 1024, 6, 6, 800, 96, 3, 336),
    "7b": Shape(4096, 11008, 32, 32, 32003, 1024, 24, 336),
    "13b": Shape(5120, 13824, 40, 40, 32003, 1024, 24, 336),
}
"""In ``middle``, head and tower have about the share of the work that they have in 13B (1 and 2 %)."""


def configuration(shape: Shape, resolution: Resolution = None) -> LlavarConfig:
    """Return the configuration of a model of this size."""
    text = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        vocab_size=shape.words,
        pad_token_id=0,
    )
    tower = CLIPVisionConfig(
        hidden_size=shape.tower,
        intermediate_size=4 * shape.tower,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=max(1, shape.tower // 64),
        image_size=shape.side,
        patch_size=PATCH,
    )
    return make_config(text, tower, vocab_size=shape.words, image_token_id=shape.words - 3, resolution=resolution)


def build(
    shape: Shape,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    resolution: Resolution = None,
) -> LlavarForConditionalGeneration:
    """Return a model of random weights in training mode, the same at each call."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlavarForConditionalGeneration._from_config(
            configuration(shape, resolution), attn_implementation="sdpa", dtype=dtype
        )
    made: LlavarForConditionalGeneration = model.train()
    return made


class Records(Dataset[Item]):
    """Items of a stage, each with an image before its first question.

    Args:
        stage: ``"stage1"`` or ``"stage2"``, for the lengths.
        count: Number of items.
        shape: Size of the model.
        longest: Number of tokens of every item, instead of random lengths.
        resolution: Of the model. With tiles, each image fills the largest grid.
        images: Number of different images, which the items share.
    """

    def __init__(
        self,
        stage: str,
        count: int,
        shape: Shape,
        *,
        longest: int | None = None,
        resolution: Resolution = None,
        images: int = IMAGES,
    ) -> None:
        self._draw = torch.Generator().manual_seed(0)
        self._shape = shape
        self._layouts: tuple[TileLayout, ...] = ()
        self.image_tokens, views, crops = shape.image_tokens, 1, 0
        if isinstance(resolution, Tiles):
            geometry = TileGeometry(resolution.grids, shape.side, PATCH, resolution.pool)
            rows, columns = max(resolution.grids, key=lambda grid: grid[0] * grid[1])
            self._layouts = (geometry.layout((columns * shape.side, rows * shape.side)),)
            self.image_tokens, views = geometry.tokens(self._layouts[0]), view_count(self._layouts[0])
        elif resolution is not None:
            crops = resolution.grid**2
        square = (3, shape.side, shape.side)
        tiled = (views, *square) if self._layouts else square
        self._images = torch.randn((images, *tiled), generator=self._draw)
        self._crops = torch.randn((images, crops, *square), generator=self._draw) if crops else None
        turns = draw_turns(stage, count, seed=0)
        if longest is not None:
            rest = longest - self._tokens(((0, 0),))
            turns = [((rest // 4, rest - rest // 4),)] * count
        self.items = [self._item(number, one) for number, one in enumerate(turns)]

    def __len__(self) -> int:
        return len(self.items)

    def draw(self, *, seed: int, shuffle: bool) -> None:
        """Return None: an epoch has each item once."""

    def __getitem__(self, index: int) -> Item:
        """Return an item."""
        return self.items[index]

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def estimated_tokens(self, index: int) -> int:
        """Return the length of an item, for the library's sampler."""
        return len(self.items[index].example.input_ids)

    def _tokens(self, turns: tuple[tuple[int, int], ...]) -> int:
        texts = sum(TURN_TOKENS + question + answer + 1 for question, answer in turns)
        return TEMPLATE_TOKENS + self.image_tokens + 2 + texts

    def _words(self, count: int) -> torch.Tensor:
        return torch.randint(FIRST_WORD, self._shape.words - 3, (count,), generator=self._draw)

    def _item(self, number: int, turns: tuple[tuple[int, int], ...]) -> Item:
        patch, start, end = (self._shape.words - back for back in (3, 2, 1))
        image = torch.tensor([start, *[patch] * self.image_tokens, end])
        parts = [torch.tensor([BOS]), self._words(TEMPLATE_TOKENS - 1), image]
        supervised = [False] * 3
        for question, answer in turns:
            parts += [self._words(TURN_TOKENS + question), self._words(answer), torch.tensor([EOS])]
            supervised += [False, True, True]
        labels = [
            part if trained else torch.full_like(part, IGNORE_INDEX)
            for part, trained in zip(parts, supervised, strict=True)
        ]
        example = Example(
            id=str(number),
            input_ids=torch.cat(parts),
            labels=torch.cat(labels),
            images=("random",),
            image_token_counts=(self.image_tokens,),
            image_layouts=self._layouts,
        )
        place = number % len(self._images)
        return Item(example, (self._images[place],), None, () if self._crops is None else (self._crops[place],))


def with_words(shape: Shape, words: int) -> Shape:
    """Return the same size with another vocabulary."""
    return replace(shape, words=words)
