"""The contenders of ``resolution.py``: a prefill and a training step of the same model with each resolution."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from train_contenders import TUNES, Cell, ours, seeded, stage_of
from train_model import SHAPES, Records, Resolution, Shape, build
from turns import Turn

from llavar_peft import CrossAttention, Tiles
from llavar_peft.data.prepared_images import image_inputs
from llavar_peft.models.tuning import apply_tuning

PLAIN = "the whole image only"
SETTINGS: dict[str, Resolution] = {
    PLAIN: None,
    **{
        f"tiles: 1 + {side * side}{', pool: 2' if pool > 1 else ''}": Tiles(grid=((side, side),), pool=pool)
        for pool in (1, 2)
        for side in (1, 2, 3)
    },
    **{f"cross_attention, grid: {grid}": CrossAttention(grid=grid) for grid in (2, 4)},
}
"""Each with an image that fills the grid, so that no token is left out as padding."""

SHAPE = Shape(512, 1376, 3, 4, 800, 128, 3, 336)
"""An eighth of a 7B's width, in decoder and tower; two layers of the tower are computed for three of the decoder, where
a 7B has 23 for 32. Attention has a larger share of the work than in a 7B."""
TINY = replace(SHAPES["tiny"], layers=1)
TEXT = 256
"""Tokens of the text of a record."""


@dataclass(frozen=True, slots=True)
class Task:
    """What one process does.

    Attributes:
        kind: ``prefill`` or ``train``.
        shape: Size of the model.
        steps: How often.
        folder: For the trainer's files.
    """

    kind: str
    shape: Shape
    steps: int
    folder: Path


class _Prefill:
    """Computes the keys and values of a prompt, again and again."""

    def __init__(self, model: Any, records: Records, steps: int, turn: Turn) -> None:
        self.model, self.records, self.steps, self.turn = model.eval(), records, steps, turn

    def train(self) -> None:
        """Report each prefill as a step, by the name that ``take_turns`` calls."""
        for step in range(self.steps):
            item = self.records[step]
            images = image_inputs(item.pixels, item.example.image_layouts, item.details)
            with torch.inference_mode():
                self.model(input_ids=item.example.input_ids[None], **images, use_cache=True, logits_to_keep=1)
            self.turn.on_step_end(None, None, None)


def make(name: str, task: Task, turn: Turn) -> Any:
    """Return what ``take_turns`` measures: an object whose ``train()`` makes the steps.

    Args:
        name: A key of ``SETTINGS``.
        task: What it does.
        turn: The callback of the benchmark.
    """
    resolution = SETTINGS[name]
    longest = TEXT + image_tokens(name, task.shape)
    records = Records("stage2", task.steps, task.shape, longest=longest, resolution=resolution, images=1)
    model = seeded(build(task.shape, resolution=resolution))
    if task.kind == "prefill":
        return _Prefill(model, records, task.steps, turn)
    folder = task.folder / str(list(SETTINGS).index(name))
    cell = Cell(stage="lora", shape=task.shape, batch=1, steps=task.steps, folder=folder)
    # As a large model is trained on a GPU.
    stage = stage_of(cell, packing=True, recompute=True)
    return ours(cell, records, turn, model=apply_tuning(model, TUNES["lora"]), stage=stage)


def image_tokens(name: str, shape: Shape) -> int:
    """Return the number of tokens of an image, with those before and after it."""
    return Records("stage2", 0, shape, resolution=SETTINGS[name], images=0).image_tokens + 2
