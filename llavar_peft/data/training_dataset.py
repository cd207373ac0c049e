"""From records to batches: the data set and the collator that a ``DataLoader`` uses in training.

An item depends on its index alone, and the order of an epoch on (seed, epoch) alone, so that a resumed run sees the
same batches. Shapes: B rows, T tokens, N images, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, zip_longest
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.data.encode_record import encode_record
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.message_records import is_message, written_turns
from llavar_peft.data.prepared_images import PreparedImage, image_inputs
from llavar_peft.data.record_images import image_keys
from llavar_peft.data.record_mixture import EpochDraw, RecordMixture
from llavar_peft.data.record_store import RecordSource
from llavar_peft.data.tile_layout import view_count
from llavar_peft.errors import DataError, ImageError
from llavar_peft.types import Example, Processor

_HOLDOUT_STREAM = 0x0C4  # distinguishes this draw from others with the run's seed
SUPERVISED_PLACES: Final = "supervised_places"
IMAGE_PLACES: Final = "image_places"
PLACES: Final = {SUPERVISED_PLACES: "supervised_counts", IMAGE_PLACES: "image_token_counts"}
"""Keys of a batch for the positions that predict a supervised token and for those of ``<im_patch>``: int64, counted
over all rows of the batch in reading order, item by item. Each has the key of a tuple with the number in each item."""
IMAGE_STARTS: Final = "image_starts"
"""Key of a batch, with a second encoder, for the token of each item at which each of its images starts: a tuple of a
tuple for each item."""


@dataclass(frozen=True, slots=True)
class Item:
    """One record, ready for a batch.

    Attributes:
        example: Ids and labels.
        pixels: float32 ``[3, H, W]`` for each image of the example, with tiles ``[V, 3, S, S]``.
        fault: Why the record carries no loss, starting with its kind (``"image: ..."``, ``"labels: ..."``), else None.
        details: The second encoder's input for each image; empty without one.
    """

    example: Example
    pixels: tuple[Tensor, ...]
    fault: str | None
    details: tuple[Tensor, ...] = ()


class TrainingDataset(Dataset[Item]):
    """Records as items, by index.

    A record that cannot be used becomes an item with ``fault`` set instead of an exception, since the trainer decides
    what happens next and a loader's worker would pass on no more than the text of an exception.

    Args:
        records: The raw records.
        indices: Indices of the records to use, in the order of the data.
        roots: The image folders.
        processor: Tokenizer, image processor and their settings.
        max_length: Maximum number of tokens of a record.
        mixture: The sources of the records, where each has image folders of its own; None uses ``roots`` for all.
    """

    def __init__(
        self,
        records: RecordSource,
        indices: Sequence[int],
        roots: ImageRoots,
        processor: Processor,
        *,
        max_length: int,
        mixture: RecordMixture | None = None,
    ) -> None:
        self.mixture = mixture
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
        images = self.roots_of(index).opened()
        try:
            # With tiles and in image mode "keep" this measures the images, whose size gives the number of their tokens.
            example = encode_record(raw, self.processor, self.max_length, roots=images)
        except ImageError as error:
            return _faulty(raw, index, f"image: {error}")
        except DataError as error:
            return _faulty(raw, index, f"record: {error}")
        if example.dropped is not None:
            return Item(example, (), f"labels: {example.dropped}")
        try:
            prepared = [
                PreparedImage.prepare(images.open(image), self.processor.image_mode, self.processor, layout)
                for image, layout in zip_longest(example.images, example.image_layouts)
            ]
        except ImageError as error:
            return _faulty(raw, index, f"image: {error}")
        details = tuple(image.detail for image in prepared if image.detail is not None)
        return Item(example, tuple(image.pixels for image in prepared), None, details)

    def roots_of(self, index: int) -> ImageRoots:
        """Return the image folders of a record, by its index in ``records``."""
        return self.roots if self.mixture is None else self.mixture.roots_of(index)

    def draw(self, *, seed: int, shuffle: bool) -> EpochDraw | None:
        """Return which items an epoch takes, by the weights of their sources; None if it takes each once."""
        return None if self.mixture is None else self.mixture.draw(self.indices, seed=seed, shuffle=shuffle)

    def estimated_tokens(self, position: int) -> int:
        """Estimate the number of tokens of an item, quickly and with the same result on every rank.

        Text counts as one token per four bytes, and an image as one of the vision tower's square size.
        """
        raw = self.records[int(self.indices[position])]
        return min(text_tokens(raw) + image_count(raw) * self.processor.num_image_tokens, self.max_length)


def text_tokens(raw: Mapping[str, Any]) -> int:
    """Estimate the number of text tokens of a raw record, valid or not, as one per four bytes."""
    turns = _stored_turns(raw)
    if turns and is_message(turns[0]):
        texts: list[Any] = list(written_turns(turns))
    else:
        texts = [turn.get("value") for turn in turns if isinstance(turn, Mapping)]
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts if isinstance(text, str)) // 4


def image_count(raw: Mapping[str, Any]) -> int:
    """Return the number of images that a raw record names or contains, whether it is valid or not."""
    num_named = sum(len(raw[key]) if isinstance(raw[key], list | tuple) else 1 for key in image_keys(raw))
    contents = [turn.get("content") for turn in _stored_turns(raw) if isinstance(turn, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return num_named or sum(isinstance(part, Mapping) and part.get("type") != "text" for part in parts)


def _stored_turns(raw: Mapping[str, Any]) -> list[Any]:
    """Return the turns or messages of a raw record; empty if it has neither."""
    return next((raw[key] for key in ("conversations", "messages") if isinstance(raw.get(key), list)), [])


def _faulty(raw: Mapping[str, Any], index: int, fault: str) -> Item:
    empty = torch.zeros(0, dtype=torch.int64)
    return Item(Example(id=str(raw.get("id", index)), input_ids=empty, labels=empty), (), fault)


class Collator:
    """Makes a batch of items: rows padded on the right, as the original does, or one packed row without padding.

    Items with a fault are listed under ``faults`` and left out of the tensors. If no item remains, the batch has a
    single unsupervised token, so that every rank has a batch.

    Args:
        pad_id: Id of the padding token.
        packed: Concatenate the items to one row.
        image_token_id: Id of ``<im_patch>``; None leaves it to the model to find the image tokens.
    """

    def __init__(self, pad_id: int, *, packed: bool = False, image_token_id: int | None = None) -> None:
        self.pad_id = pad_id
        self.packed = packed
        self.image_token_id = image_token_id

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Make a batch of B items.

        Returns:
            Padded: ``input_ids``, ``labels``, ``attention_mask`` ``[B, T]``.
            Packed: ``input_ids``, ``labels`` ``[1, T]``, and two tuples with a number for each item: ``lengths`` in
            tokens, and ``image_counts``.
            With a second encoder: ``image_starts``.
            Both: ``ids`` and ``faults`` for the trainer; the positions in ``PLACES``; the number of ``tokens`` without
            padding; and, if there are images, ``pixel_values`` ``[N, 3, H, W]``, or a list of N tensors ``[3, H, W]``
            of different sizes.
        """
        usable = [item for item in items if item.fault is None]
        rows = self._packed_row(usable) if self.packed else self._padded_rows(usable)
        batch: dict[str, Any] = {
            **rows,
            **self._find_places(usable, width=None if self.packed else rows["input_ids"].shape[1]),
            "ids": [item.example.id for item in usable],
            "faults": [(item.example.id, item.fault) for item in items if item.fault is not None],
        }
        pixels = [image for item in usable for image in item.pixels]
        layouts = [layout for item in usable for layout in item.example.image_layouts]
        details = [detail for item in usable for detail in item.details]
        if details and self.image_token_id is not None:
            batch[IMAGE_STARTS] = tuple(_image_starts(item.example, self.image_token_id) for item in usable)
        return {**batch, **image_inputs(pixels, layouts, details)}

    def _find_places(self, usable: Sequence[Item], *, width: int | None) -> dict[str, Any]:
        """Return where the tokens are that the model looks for, so that no device has to be asked for it.

        Args:
            usable: The items of the batch.
            width: Length of a padded row; None for a packed one.
        """
        lengths = [len(item.example.input_ids) for item in usable]
        starts = accumulate(lengths[:-1], initial=0) if width is None else range(0, width * len(usable), width)
        places_by_item: dict[str, list[Tensor]] = {SUPERVISED_PLACES: []}
        if self.image_token_id is not None:
            places_by_item[IMAGE_PLACES] = []
        for start, item in zip(starts, usable, strict=False):
            # The token at a position predicts the label of the next one.
            is_supervised = item.example.labels[1:].ne(IGNORE_INDEX)
            places_by_item[SUPERVISED_PLACES].append(is_supervised.nonzero()[:, 0] + start)
            if self.image_token_id is not None:
                is_image = item.example.input_ids.eq(self.image_token_id)
                places_by_item[IMAGE_PLACES].append(is_image.nonzero()[:, 0] + start)
        batch: dict[str, Any] = {"tokens": sum(lengths) or 1}
        for name, places in places_by_item.items():
            at_least_one = places or [torch.zeros(0, dtype=torch.int64)]
            batch[name] = torch.cat(at_least_one)
            batch[PLACES[name]] = tuple(map(len, at_least_one))
        return batch

    def _padded_rows(self, usable: Sequence[Item]) -> dict[str, Tensor]:
        lengths = [len(item.example.input_ids) for item in usable] or [1]
        shape = (len(lengths), max(lengths))
        input_ids_BT = torch.full(shape, self.pad_id, dtype=torch.int64)
        labels_BT = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        attention_mask_BT = torch.zeros(shape, dtype=torch.int64)
        for row, length in enumerate(lengths):
            attention_mask_BT[row, :length] = 1
        for row, item in enumerate(usable):
            input_ids_BT[row, : lengths[row]] = item.example.input_ids
            labels_BT[row, : lengths[row]] = item.example.labels
        return {"input_ids": input_ids_BT, "labels": labels_BT, "attention_mask": attention_mask_BT}

    def _packed_row(self, usable: Sequence[Item]) -> dict[str, Any]:
        if not usable:
            return _unsupervised_row(torch.tensor([[self.pad_id]]))
        labels = [item.example.labels.clone() for item in usable]
        for labels_T in labels:
            labels_T[0] = IGNORE_INDEX  # the last token of the item before it must not predict this one
        return {
            "input_ids": torch.cat([item.example.input_ids for item in usable])[None],
            "labels": torch.cat(labels)[None],
            "lengths": tuple(len(labels_T) for labels_T in labels),
            "image_counts": tuple(len(item.pixels) for item in usable),
        }


def _image_starts(example: Example, image_token_id: int) -> tuple[int, ...]:
    """Return the position of each image's first token."""
    places = example.input_ids.eq(image_token_id).nonzero()[:, 0].tolist()
    return tuple(places[number] for number in accumulate(example.image_token_counts[:-1], initial=0) if places)


def split_batch(batch: Mapping[str, Any], bins: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Split a packed row into several packed rows.

    Args:
        batch: From a packing ``Collator``, without ``ids`` and ``faults``.
        bins: Indices of the items of each new row; an empty bin gives a row with a single unsupervised token.
    """
    lengths, image_counts = batch["lengths"], batch["image_counts"]
    columns_of_item = [slice(end - length, end) for length, end in zip(lengths, accumulate(lengths), strict=True)]
    images_of_item = [
        range(end - count, end) for count, end in zip(image_counts, accumulate(image_counts), strict=True)
    ]
    rows = []
    for items in bins:
        if not items:
            rows.append(_unsupervised_row(batch["input_ids"][:, :1]))
            continue
        row: dict[str, Any] = {
            name: torch.cat([batch[name][:, columns_of_item[item]] for item in items], dim=1)
            for name in ("input_ids", "labels")
        }
        row["lengths"] = tuple(lengths[item] for item in items)
        row["image_counts"] = tuple(image_counts[item] for item in items)
        row["tokens"] = sum(row["lengths"])
        for places, counts in PLACES.items():
            if places in batch:
                row[places] = _move_places(batch[places], batch[counts], items, lengths)
                row[counts] = tuple(batch[counts][item] for item in items)
        if any(row["image_counts"]):
            if IMAGE_STARTS in batch:
                row[IMAGE_STARTS] = tuple(batch[IMAGE_STARTS][item] for item in items)
            row.update(_pick_images(batch, [image for item in items for image in images_of_item[item]]))
        rows.append(row)
    return rows


def _pick_images(batch: Mapping[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    """Return the model's arguments for some of a batch's images, in this order."""
    pixels, all_layouts = batch["pixel_values"], batch.get("image_layouts", ())
    pixels_of_image = torch.split(pixels, list(map(view_count, all_layouts))) if all_layouts else pixels
    layouts = [all_layouts[index] for index in indices] if all_layouts else []
    details = [batch["detail_values"][index] for index in indices] if "detail_values" in batch else []
    return image_inputs([pixels_of_image[index] for index in indices], layouts, details)


def _move_places(places: Tensor, counts: Sequence[int], items: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Return the positions of some items of a packed row in a row of these items alone."""
    places_of_item, old_starts = torch.split(places, list(counts)), list(accumulate(lengths, initial=0))
    new_starts = accumulate((lengths[item] for item in items), initial=0)
    moved = [
        places_of_item[item] + (new_start - old_starts[item])
        for item, new_start in zip(items, new_starts, strict=False)
    ]
    return torch.cat(moved)


def _unsupervised_row(input_ids_11: Tensor) -> dict[str, Any]:
    """Return a packed row of a single token that carries no loss."""
    labels_11 = torch.full_like(input_ids_11, IGNORE_INDEX)
    row: dict[str, Any] = {"input_ids": input_ids_11, "labels": labels_11, "lengths": (1,), "image_counts": (0,)}
    return {**row, "tokens": 1, SUPERVISED_PLACES: input_ids_11.new_zeros(0), PLACES[SUPERVISED_PLACES]: (0,)}


_DEFAULT_SHARE = 0.02
_DEFAULT_FROM = 100  # records; of fewer, none are held out by default
_DEFAULT_MOST = 64  # records


def count_held_out(count: int, holdout: float | None) -> int:
    """Return the number of held-out records.

    Args:
        count: Number of records.
        holdout: A share below 1, or a number of records from 1 upwards. None is 2 % of 100 records or more, at most 64,
            and none of fewer.
    """
    if holdout is None:
        return min(round(_DEFAULT_SHARE * count), _DEFAULT_MOST) if count >= _DEFAULT_FROM else 0
    return int(holdout) if holdout >= 1 else round(holdout * count)


def split_holdout(count: int, holdout: float | None, *, seed: int) -> tuple[list[int], list[int]]:
    """Split records into training and held-out records; the draw depends on the seed alone.

    Args:
        count: Number of records.
        holdout: As in ``count_held_out``.
        seed: Seed of the run.

    Returns:
        Indices of the training and of the held-out records, each in ascending order.

    Raises:
        DataError: No record remains for training.
    """
    number = count_held_out(count, holdout)
    if number >= count:
        raise DataError.at(
            "data.holdout",
            f"no records remain for training (got {holdout:g}, expected fewer than the {count} records)",
            "hold out fewer records",
        )
    held_out = np.sort(np.random.default_rng((seed, _HOLDOUT_STREAM)).permutation(count)[:number])
    training = np.setdiff1d(np.arange(count), held_out)
    return training.tolist(), held_out.tolist()
