"""Levers of ``train.py`` that need other inputs: images decoded ahead, and batches balanced over ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_inputs import write_images
from lengths import TEMPLATE_TOKENS, TURN_TOKENS, draw_turns
from torch.utils.data import Dataset
from train_contenders import TUNES, Cell, ours, seeded, stage_of
from train_model import Records, Shape, build
from transformers import CLIPImageProcessorPil
from turns import Steps, Turn, take_turns, useful_tokens

from llavar_peft.data.epoch_sampler import balance_bins
from llavar_peft.data.image_preparation import prepare_image
from llavar_peft.data.training_dataset import Item
from llavar_peft.models.tuning import apply_tuning

RANKS, RECORDS, STEPS = 8, 4, 500
WORKERS = 2


class Decoded(Dataset[Item]):
    """Records whose images are opened on access.

    Args:
        records: The records.
        paths: The image files.
        side: Side of a prepared image, in pixels.
    """

    def __init__(self, records: Records, paths: Sequence[Path], side: int) -> None:
        self.records = records
        self.paths = paths
        self.clip = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Item:
        """Return the item with the pixels of a file."""
        pixels = prepare_image(self.paths[index % len(self.paths)], "pad", self.clip)
        return dataclasses.replace(self.records[index], pixels=(pixels,))

    def estimated_tokens(self, index: int) -> int:
        """Return the length of an item."""
        return self.records.estimated_tokens(index)


def decoding(shape: Shape, *, batch: int, steps: int, work: Path) -> tuple[dict[str, Steps], list[int]]:
    """Train stage 1 from JPEG files that workers open ahead, and that the step itself opens.

    Args:
        shape: Size of the model.
        batch: Number of records of a step.
        steps: Number of optimizer steps.
        work: Folder for files.

    Returns:
        The measurements of ``decoding ahead`` and ``decoding``, and the number of tokens of each step.
    """
    folder = work / "jpeg"
    folder.mkdir(parents=True)
    records = Records("stage1", steps * batch, shape)
    opened = Decoded(records, write_images(folder, 12, seed=0), shape.side)

    def maker(name: str, workers: int) -> Any:
        def make(turn: Turn) -> Any:
            cell = Cell(stage="stage1", shape=shape, batch=batch, steps=steps, folder=work / name, workers=workers)
            stage = stage_of(cell, packing=True, recompute="auto")
            model = apply_tuning(seeded(build(shape)), TUNES["stage1"])
            return ours(cell, opened, turn, model=model, stage=stage)

        return make

    makers = {"decoding ahead": maker("decoding ahead", WORKERS), "decoding": maker("decoding", 0)}
    return take_turns(makers, steps), useful_tokens(records.items, batch, steps)


def even_ranks() -> str:
    """Count the tokens that balancing saves where ranks wait for each other, and describe the result."""
    lengths = [
        576 + 2 + TEMPLATE_TOKENS + sum(TURN_TOKENS + question + answer + 1 for question, answer in turns)
        for turns in draw_turns("stage2", STEPS * RANKS * RECORDS, seed=0)
    ]
    gains = []
    for start in range(0, len(lengths), RANKS * RECORDS):
        step = lengths[start : start + RANKS * RECORDS]
        padded = max(max(step[rank : rank + RECORDS]) * RECORDS for rank in range(0, len(step), RECORDS))
        drawn = max(sum(step[rank : rank + RECORDS]) for rank in range(0, len(step), RECORDS))
        even = max(sum(step[index] for index in one) for one in balance_bins(step, RANKS, capacity=RECORDS))
        gains.append((drawn / even, padded / even))
    drawn, padded = (sum(gain) / len(gain) for gain in zip(*gains, strict=True))
    return (
        f"Balancing over {RANKS} ranks of {RECORDS} records, simulated on {STEPS} steps of stage 2: the slowest"
        f" rank has {drawn:.2f} times fewer tokens than as drawn, {padded:.2f} times fewer than as drawn and padded."
    )
