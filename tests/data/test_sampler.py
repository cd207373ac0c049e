"""The order of an epoch, and the division of a step into micro batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llavar_peft.data.epoch_sampler import Balance, EpochSampler, balance_bins, bins_under_limit
from llavar_peft.data.training_dataset import (
    IMAGE_PLACES,
    PLACES,
    SUPERVISED_PLACES,
    Collator,
    Item,
    split_batch,
)
from llavar_peft.types import Example

SIZES = st.lists(st.integers(1, 2000), min_size=1, max_size=64)


def _micros(order: list[int], micro: int) -> list[list[int]]:
    return [order[start : start + micro] for start in range(0, len(order), micro)]


@given(count=st.integers(1, 90), micro=st.integers(1, 4), per_step=st.integers(1, 6), seed=st.integers(0, 99))
def test_balancing_keeps_the_records_of_each_step(count: int, micro: int, per_step: int, seed: int) -> None:
    step = micro * per_step
    drawn = list(EpochSampler(count, seed=seed, shuffle=True))
    order = list(
        EpochSampler(count, seed=seed, shuffle=True, balanced=Balance(step, micro, lambda item: item * 7 % 13))
    )
    for one, other in zip(_micros(drawn, step), _micros(order, step), strict=True):
        assert sorted(one) == sorted(other)


def test_the_order_depends_on_the_epoch_only() -> None:
    def order(epoch: int) -> list[int]:
        sampler = EpochSampler(40, seed=1, shuffle=True, balanced=Balance(8, 2, lambda item: item))
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_without_shuffling_the_order_of_the_data_is_kept() -> None:
    balanced = Balance(8, 2, lambda item: item)
    assert list(EpochSampler(20, seed=1, shuffle=False, balanced=balanced)) == list(range(20))


@given(sizes=SIZES, bins=st.integers(1, 8))
def test_balanced_bins_hold_each_item_once_within_their_capacity(sizes: list[int], bins: int) -> None:
    capacity = -(-len(sizes) // bins)
    divided = balance_bins(sizes, bins, capacity=capacity)
    assert sorted(index for one in divided for index in one) == list(range(len(sizes)))
    assert max(map(len, divided)) <= capacity
    sums = [sum(sizes[index] for index in one) for one in divided]
    assert sums == sorted(sums, reverse=True)


def test_balancing_reduces_the_time_that_ranks_wait() -> None:
    """Simulate the lengths of LLaVA-Instruct on eight ranks with micro batches of four."""
    generator = torch.Generator().manual_seed(0)
    sizes = (650 + 180 * torch.randn(3200, generator=generator).exp()).clamp(max=2048).int().tolist()

    def waiting(order: list[int]) -> float:
        totals = torch.tensor([sum(sizes[item] for item in one) for one in _micros(order, 4)]).view(-1, 8).float()
        return float(totals.max(dim=1).values.sum() * 8 / totals.sum())

    drawn = EpochSampler(3200, seed=0, shuffle=True)
    even = EpochSampler(3200, seed=0, shuffle=True, balanced=Balance(32, 4, sizes.__getitem__))
    assert waiting(list(drawn)) > 1.2
    assert (
        waiting(list(even)) < 1.07
    )  # 1.063 is the optimum: a micro batch with a record of 2048 tokens holds three others


@given(sizes=SIZES, limit=st.integers(1, 4000))
def test_bins_stay_within_the_limit_unless_a_single_item_exceeds_it(sizes: list[int], limit: int) -> None:
    divided = bins_under_limit(sizes, limit)
    assert sorted(index for one in divided for index in one) == list(range(len(sizes)))
    for one in divided:
        assert sum(sizes[index] for index in one) <= limit or len(one) == 1
    # First fit in descending size is within 11/9 of the optimum, with at most one bin that is half empty.
    assert sum(2 * sum(sizes[index] for index in one) <= limit for one in divided) <= 1


@pytest.mark.parametrize("stacked", [True, False], ids=["one size", "several sizes"])
def test_a_split_row_keeps_each_conversation_with_its_images(stacked: bool) -> None:
    pixels: Any = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2)
    batch: dict[str, Any] = {
        "input_ids": torch.arange(10)[None],
        "labels": torch.arange(10)[None] + 100,
        "lengths": (3, 2, 4, 1),
        "image_counts": (1, 0, 2, 1),
        "pixel_values": pixels if stacked else list(pixels),
    }
    first, second, third = split_batch(batch, [[0, 3], [1], [2]])
    assert first["input_ids"].tolist() == [[0, 1, 2, 9]]
    assert first["labels"].tolist() == [[100, 101, 102, 109]]
    assert (first["lengths"], first["image_counts"]) == ((3, 1), (1, 1))
    assert [float(image.mean()) for image in first["pixel_values"]] == [0.0, 3.0]
    assert "pixel_values" not in second
    assert [float(image.mean()) for image in third["pixel_values"]] == [1.0, 2.0]


def test_a_row_without_conversations_is_unsupervised() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6]]),
        "labels": torch.tensor([[5, 6]]),
        "lengths": (2,),
        "image_counts": (0,),
    }
    _, empty = split_batch(batch, [[0], []])
    assert empty["input_ids"].shape == (1, 1)
    assert (empty["labels"] == -100).all()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_places_are_those_of_supervised_and_image_tokens(packed: bool) -> None:
    """In a batch, in each row that it is split into, and in a batch without usable items."""
    items = [
        _item(ids, labels) for ids, labels in ((_IDS[:4], [0, 0, 9, 9]), (_IDS, [0, 9, 0, 0, 9, 0]), ([1, 2], [9, 9]))
    ]
    collate = Collator(0, packed=packed, image_token_id=7)
    batch = collate(items)
    rows = [batch, *(split_batch(batch, [[2, 0], [1], []]) if packed else [])]
    for row in [*rows, collate([Item(Example("bad", *[torch.zeros(0, dtype=torch.int64)] * 2), (), "image: broken")])]:
        targets = torch.nn.functional.pad(row["labels"], (0, 1), value=-100)[:, 1:].flatten()
        assert row[SUPERVISED_PLACES].tolist() == (targets != -100).nonzero()[:, 0].tolist()
        assert sum(row[PLACES[SUPERVISED_PLACES]]) == len(row[SUPERVISED_PLACES])
        if IMAGE_PLACES in row:
            assert row[IMAGE_PLACES].tolist() == (row["input_ids"].flatten() == 7).nonzero()[:, 0].tolist()
    assert batch["tokens"] == 12
    assert batch[PLACES[SUPERVISED_PLACES]] == (2, 2, 1)
    assert batch[PLACES[IMAGE_PLACES]] == (2, 2, 0)


_IDS = [1, 7, 7, 3, 4, 5]


def _item(ids: list[int], labels: list[int]) -> Item:
    ignored = torch.tensor([label or -100 for label in labels])
    return Item(Example("a", torch.tensor(ids), ignored), (), None)
