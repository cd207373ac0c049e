"""From records to batches: what a ``DataLoader`` iterates over in training.

No draw is made here: the order of an epoch comes from (seed, epoch) alone and an item from its index alone, so that a
resumed run sees the same batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.data.encode_record import encode_record
from llavar_peft.data.image_preparation import ImageRoots, prepare_image
from llavar_peft.data.split_packed_batch import nothing_to_learn
from llavar_peft.errors import DataError, ImageError
from llavar_peft.types import Example, Processor

_HOLDOUT_STREAM = 0x0C4


@dataclass(frozen=True, slots=True)
class Item:
    """One record, ready for a batch.

    Attributes:
        example: Ids and labels.
        pixels: One ``[3, H, W]`` for each image of the example.
        fault: Why the record carries no loss, with the kind first (``"image: ..."``, ``"labels: ..."``), else None.
    """

    example: Example
    pixels: tuple[Tensor, ...]
    fault: str | None


class RecordSequence(Protocol):
    """Raw records by index."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """The record as it stands in its file."""
        ...


class TrainingDataset(Dataset[Item]):
    """Records as items, by index.

    A record that cannot be trained on comes back as an item with ``fault`` set, never as an exception: a loader's
    worker would hand on only its text, and the policy is the trainer's.

    Args:
        records: The raw records.
        indices: Which of them, in the order of the data.
        roots: Where their images are.
        processor: Tokenizer, image processor and their settings.
        max_length: Tokens per record.
    """

    def __init__(
        self,
        records: RecordSequence,
        indices: Sequence[int],
        roots: ImageRoots,
        processor: Processor,
        *,
        max_length: int,
    ) -> None:
        self.records = records
        self.indices = np.asarray(indices, dtype=np.int64)
        self.roots = roots
        self.processor = processor
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Item:
        index = int(self.indices[position])
        raw = self.records[index]
        try:
            # Mode "keep" has to measure the images before it can count their tokens.
            example = encode_record(raw, self.processor, self.max_length, roots=self.roots)
        except ImageError as error:
            return _faulty(raw, index, f"image: {error}")
        except DataError as error:
            return _faulty(raw, index, f"record: {error}")
        if example.dropped is not None:
            return Item(example, (), f"labels: {example.dropped}")
        try:
            pixels = tuple(
                prepare_image(self.roots.open(path), self.processor.image_mode, self.processor)
                for path in example.images
            )
        except ImageError as error:
            return _faulty(raw, index, f"image: {error}")
        return Item(example, pixels, None)

    def estimated_tokens(self, position: int) -> int:
        """About how long an item is: cheap, the same on every rank, and good enough to balance batches by.

        Args:
            position: Of the item.

        Returns:
            Tokens; text is taken at four bytes a token, an image at the tower's square size.
        """
        raw = self.records[int(self.indices[position])]
        return min(text_tokens(raw) + image_count(raw) * self.processor.num_image_tokens, self.max_length)


def text_tokens(raw: Mapping[str, Any]) -> int:
    """About how many tokens a record's text has, at four bytes a token.

    Args:
        raw: As it stands in its file, sound or not.

    Returns:
        The number.
    """
    turns = raw.get("conversations")
    texts = [turn.get("value") for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    return sum(len(text.encode()) for text in texts if isinstance(text, str)) // 4


def image_count(raw: Mapping[str, Any]) -> int:
    """How many images a record names.

    Args:
        raw: As it stands in its file, sound or not.

    Returns:
        The number.
    """
    named = raw.get("image")
    return len(named) if isinstance(named, list) else int(named is not None)


def _faulty(raw: Mapping[str, Any], index: int, fault: str) -> Item:
    nothing = torch.zeros(0, dtype=torch.int64)
    return Item(Example(id=str(raw.get("id", index)), input_ids=nothing, labels=nothing), (), fault)


class Collator:
    """Makes a batch of a list of items: rows padded on the right, as the original does, or one row without padding.

    Items with a fault are left out of the tensors and named under ``faults``. Where none is left, a single unsupervised
    position stands in, so that every rank still has a batch.

    Args:
        pad_id: The pad token's id.
        packed: Whether the items are laid end to end in one row.
    """

    def __init__(self, pad_id: int, *, packed: bool = False) -> None:
        self.pad_id = pad_id
        self.packed = packed

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Make a batch.

        Args:
            items: B items.

        Returns:
            ``input_ids``, ``labels``, ``attention_mask`` ``[B, T]``, or packed ``input_ids``, ``labels`` ``[1, T]`` and
            two tuples with a number for each item, ``lengths`` in tokens and ``pictures``; ``pixel_values``
            ``[N, 3, H, W]`` (a list of ``[3, H, W]`` where sizes differ) if there are images; ``ids`` and ``faults``
            for the trainer.
        """
        good = [item for item in items if item.fault is None]
        batch: dict[str, Any] = {
            **(self._in_one_row(good) if self.packed else self._padded(good)),
            "ids": [item.example.id for item in good],
            "faults": [(item.example.id, item.fault) for item in items if item.fault is not None],
        }
        pixels = [image for item in good for image in item.pixels]
        if pixels:
            same = len({tuple(image.shape) for image in pixels}) == 1
            batch["pixel_values"] = torch.stack(pixels) if same else pixels
        return batch

    def _padded(self, good: Sequence[Item]) -> dict[str, Tensor]:
        lengths = [len(item.example.input_ids) for item in good] or [1]
        rows, width = len(lengths), max(lengths)
        input_ids = torch.full((rows, width), self.pad_id, dtype=torch.int64)
        labels = torch.full((rows, width), IGNORE_INDEX, dtype=torch.int64)
        attention_mask = torch.zeros((rows, width), dtype=torch.int64)
        for row, length in enumerate(lengths):
            attention_mask[row, :length] = 1
        for row, item in enumerate(good):
            length = lengths[row]
            input_ids[row, :length] = item.example.input_ids
            labels[row, :length] = item.example.labels
        return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}

    def _in_one_row(self, good: Sequence[Item]) -> dict[str, Any]:
        if not good:
            return nothing_to_learn(torch.tensor([[self.pad_id]]))
        labels = [item.example.labels.clone() for item in good]
        for one in labels:
            one[0] = IGNORE_INDEX  # nobody predicts a conversation's first token from the one before it
        return {
            "input_ids": torch.cat([item.example.input_ids for item in good])[None],
            "labels": torch.cat(labels)[None],
            "lengths": tuple(len(one) for one in labels),
            "pictures": tuple(len(item.pixels) for item in good),
        }


def split_holdout(count: int, holdout: float, *, seed: int) -> tuple[list[int], list[int]]:
    """Split records into those trained on and those held out, by (seed) alone.

    Args:
        count: Number of records.
        holdout: A share below 1, or a number from 1 up.
        seed: The run's.

    Returns:
        Indices trained on and held out, each in the data's order.

    Raises:
        DataError: Nothing is left to train on.
    """
    expected = int(holdout) if holdout >= 1 else round(holdout * count)
    if expected >= count:
        raise DataError.at(
            "data.holdout", f"leaves nothing to train on (got {holdout:g}, there are {count} records)", "hold out fewer"
        )
    held = np.sort(np.random.default_rng((seed, _HOLDOUT_STREAM)).permutation(count)[:expected])
    kept = np.setdiff1d(np.arange(count), held)
    return kept.tolist(), held.tolist()
