"""A packed batch, divided into rows that each fit into one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from llavar_peft.constants import IGNORE_INDEX


def nothing_to_learn(token: Tensor) -> dict[str, Any]:
    """A packed row of a single unsupervised position.

    Args:
        token: Its id, ``[1, 1]``.

    Returns:
        What ``Collator`` makes of a row, without images.
    """
    return {
        "input_ids": token,
        "labels": torch.full_like(token, IGNORE_INDEX),
        "lengths": (token.shape[1],),
        "pictures": (0,),
    }


def split_batch(batch: Mapping[str, Any], bins: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Make several packed rows of one.

    Args:
        batch: What a packing ``Collator`` made, without what is for the trainer.
        bins: Numbers of the conversations that each new row takes; an empty one gives a row with nothing to learn.

    Returns:
        A batch for each bin.
    """
    lengths, images = batch["lengths"], batch["pictures"]
    columns = [slice(end - length, end) for length, end in zip(lengths, accumulate(lengths), strict=True)]
    places = [slice(end - count, end) for count, end in zip(images, accumulate(images), strict=True)]
    rows = []
    for numbers in bins:
        if not numbers:
            rows.append(nothing_to_learn(batch["input_ids"][:, :1]))
            continue
        row: dict[str, Any] = {
            name: torch.cat([batch[name][:, columns[number]] for number in numbers], dim=1)
            for name in ("input_ids", "labels")
        }
        row["lengths"] = tuple(lengths[number] for number in numbers)
        row["pictures"] = tuple(images[number] for number in numbers)
        if any(row["pictures"]):
            found = [batch["pixel_values"][places[number]] for number in numbers]
            same = isinstance(batch["pixel_values"], Tensor)
            row["pixel_values"] = torch.cat(found) if same else [image for one in found for image in one]
        rows.append(row)
    return rows
