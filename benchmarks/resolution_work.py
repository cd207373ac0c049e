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
from llavar_peft.preflight.estimate_stage import estimate_stage
from llavar_peft.recipe.presets import load_recipe

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
RECORD = 2048
"""Tokens of a record of a model without a resolution, in the estimates; the others have so much the more."""


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
    cell = Cell(stage="lora", shape=task.shape, batch=1, steps=task.steps, folder=task.folder / str(len(name)))
    # As a large model is trained on a GPU.
    stage = stage_of(cell, packing=True, recompute=True)
    return ours(cell, records, turn, model=apply_tuning(model, TUNES["lora"]), stage=stage)


def image_tokens(name: str, shape: Shape) -> int:
    """Return the number of tokens of an image, with those before and after it."""
    return Records("stage2", 0, shape, resolution=SETTINGS[name], images=0).image_tokens + 2


@dataclass(frozen=True, slots=True)
class Sized:
    """What ``estimate`` says of a model of real size.

    Attributes:
        image_tokens: Tokens of an image.
        record_tokens: Tokens of a record.
        qlora: Memory of the GPU for QLoRA with one record in a pass.
        full: Memory of each of 8 GPUs for full finetuning with one record in a pass.
        flops: Operations of a QLoRA step with one record.
    """

    image_tokens: int
    record_tokens: int
    qlora: int
    full: int
    flops: float


def estimate(size: str, name: str) -> Sized:
    """Estimate a training on one record.

    Args:
        size: ``7b`` or ``13b``.
        name: A key of ``SETTINGS``.
    """
    plain, here = (image_tokens(one, SHAPES["middle"]) for one in (PLAIN, name))
    tokens = RECORD + here - plain

    def stage_for(preset: str | None, gpus: int) -> Any:
        recipe = load_recipe(f"llavar-{size}", [], preset=preset)
        stage = replace(
            recipe.stages[-1], max_length=tokens, micro_batch_size=1, global_batch_size=gpus, max_tokens=None
        )
        return estimate_stage(replace(recipe.model, resolution=SETTINGS[name]), stage, gpus=gpus)

    one, eight = stage_for("qlora", 1), stage_for(None, 8)
    return Sized(one.image_tokens, tokens, one.memory.peak, eight.memory.peak, one.step_flops)
