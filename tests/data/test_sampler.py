"""The order of records, and how a step's records are divided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llavar_peft.data.epoch_sampler import Balance, EpochSampler, balance_bins, bins_under_limit
from llavar_peft.data.split_packed_batch import split_batch

SIZES = st.lists(st.integers(1, 2000), min_size=1, max_size=64)


def _micros(order: list[int], micro: int) -> list[list[int]]:
    return [order[start : start + micro] for start in range(0, len(order), micro)]


@given(count=st.integers(1, 90), micro=st.integers(1, 4), per_step=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_step_holds_the_records_it_would_have_held(count: int, micro: int, per_step: int, seed: int) -> None:
    step = micro * per_step
    drawn = list(EpochSampler(count, seed=seed, shuffle=True))
    order = list(
        EpochSampler(count, seed=seed, shuffle=True, balanced=Balance(step, micro, lambda item: item * 7 % 13))
    )
    for one, other in zip(_micros(drawn, step), _micros(order, step), strict=True):
        assert sorted(one) == sorted(other)


def test_an_epoch_has_its_own_order_and_always_the_same() -> None:
    def order(epoch: int) -> list[int]:
        sampler = EpochSampler(40, seed=1, shuffle=True, balanced=Balance(8, 2, lambda item: item))
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_the_datas_own_order_is_not_touched() -> None:
    balanced = Balance(8, 2, lambda item: item)
    assert list(EpochSampler(20, seed=1, shuffle=False, balanced=balanced)) == list(range(20))


@given(sizes=SIZES, bins=st.integers(1, 8))
def test_even_bins_hold_everything_once_and_no_more_than_their_share(sizes: list[int], bins: int) -> None:
    capacity = -(-len(sizes) // bins)
    divided = balance_bins(sizes, bins, capacity=capacity)
    assert sorted(index for one in divided for index in one) == list(range(len(sizes)))
    assert max(map(len, divided)) <= capacity
    sums = [sum(sizes[index] for index in one) for one in divided]
    assert sums == sorted(sums, reverse=True)


def test_ranks_that_wait_for_each_other_get_about_as_much() -> None:
    """LLaVA-Instruct's spread of lengths, eight ranks, micro batches of four: how long the slowest keeps the others."""
    generator = torch.Generator().manual_seed(0)
    sizes = (650 + 180 * torch.randn(3200, generator=generator).exp()).clamp(max=2048).int().tolist()

    def waiting(order: list[int]) -> float:
        totals = torch.tensor([sum(sizes[item] for item in one) for one in _micros(order, 4)]).view(-1, 8).float()
        return float(totals.max(dim=1).values.sum() * 8 / totals.sum())

    drawn = EpochSampler(3200, seed=0, shuffle=True)
    even = EpochSampler(3200, seed=0, shuffle=True, balanced=Balance(32, 4, sizes.__getitem__))
    assert waiting(list(drawn)) > 1.2
    assert waiting(list(even)) < 1.07  # 1.063 is the best there is: a record of 2048 needs three companions


@given(sizes=SIZES, limit=st.integers(1, 4000))
def test_no_bin_is_above_its_limit_unless_one_thing_is(sizes: list[int], limit: int) -> None:
    divided = bins_under_limit(sizes, limit)
    assert sorted(index for one in divided for index in one) == list(range(len(sizes)))
    for one in divided:
        assert sum(sizes[index] for index in one) <= limit or len(one) == 1
    # First fit, largest first, is within 11/9 of the best; half filled bins at most once.
    assert sum(2 * sum(sizes[index] for index in one) <= limit for one in divided) <= 1


@pytest.mark.parametrize("stacked", [True, False], ids=["one size", "several sizes"])
def test_a_row_divided_holds_each_conversation_with_its_images(stacked: bool) -> None:
    pixels: Any = torch.arange(4.0)[:, None, None, None].expand(4, 3, 2, 2)
    batch: dict[str, Any] = {
        "input_ids": torch.arange(10)[None],
        "labels": torch.arange(10)[None] + 100,
        "lengths": (3, 2, 4, 1),
        "pictures": (1, 0, 2, 1),
        "pixel_values": pixels if stacked else list(pixels),
    }
    first, second, third = split_batch(batch, [[0, 3], [1], [2]])
    assert first["input_ids"].tolist() == [[0, 1, 2, 9]]
    assert first["labels"].tolist() == [[100, 101, 102, 109]]
    assert (first["lengths"], first["pictures"]) == ((3, 1), (1, 1))
    assert [float(image.mean()) for image in first["pixel_values"]] == [0.0, 3.0]
    assert "pixel_values" not in second
    assert [float(image.mean()) for image in third["pixel_values"]] == [1.0, 2.0]


def test_a_row_without_a_conversation_has_nothing_to_learn() -> None:
    batch = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, 6]]), "lengths": (2,), "pictures": (0,)}
    _, nothing = split_batch(batch, [[0], []])
    assert nothing["input_ids"].shape == (1, 1)
    assert (nothing["labels"] == -100).all()
