"""A mixture of sources: what an epoch takes depends on (seed, epoch) alone, and the weights say how much of each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavar_peft.data.epoch_sampler import Balance, EpochSampler
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.record_mixture import EpochDraw, OpenSource, RecordMixture
from llavar_peft.data.record_store import open_records

SOURCES = st.lists(st.tuples(st.integers(0, 40), st.floats(0.05, 4)), min_size=1, max_size=4).filter(
    lambda sources: any(count for count, _ in sources)
)


def draw_of(sources: list[tuple[int, float]], *, seed: int = 0, shuffle: bool = True) -> EpochDraw:
    ends = np.cumsum([count for count, _ in sources]).tolist()
    groups = list(zip([0, *ends[:-1]], ends, strict=True))
    return EpochDraw(groups, [weight for _, weight in sources], seed, shuffle)


@settings(deadline=None)
@given(SOURCES, st.integers(0, 2**32 - 1), st.booleans())
def test_an_epoch_takes_of_each_source_by_its_weight(
    sources: list[tuple[int, float]], seed: int, shuffle: bool
) -> None:
    draw = draw_of(sources, seed=seed, shuffle=shuffle)
    counts = [max(1, round(weight * count)) if count else 0 for count, weight in sources]
    epochs = [draw(epoch) for epoch in range(5)]
    assert {len(epoch) for epoch in epochs} == {len(draw)} == {sum(counts)}
    start = 0
    for (count, _), taken in zip(sources, counts, strict=True):
        own = [[item for item in epoch.tolist() if start <= item < start + count] for epoch in epochs]
        assert {len(items) for items in own} == {taken}
        # After any number of epochs, all records of a source were taken equally often, give or take once.
        seen: Counter[int] = Counter()
        for items in own if taken != count else ():
            seen.update(items)
            assert max(seen.values()) - (min(seen.values()) if len(seen) == count else 0) <= 1
        start += count
    # The same in any order of the calls, and in another process.
    again = draw_of(sources, seed=seed, shuffle=shuffle)
    assert [again(epoch).tolist() for epoch in reversed(range(5))] == [epoch.tolist() for epoch in reversed(epochs)]


def test_no_random_state_of_the_process_is_used_or_changed() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    first = draw_of([(10, 0.5), (5, 2.0)])(3).tolist()
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]
    np.random.seed(2)
    assert draw_of([(10, 0.5), (5, 2.0)])(3).tolist() == first


def test_a_weighted_order_is_shuffled_as_a_whole_and_repeats_for_an_epoch() -> None:
    sampler = EpochSampler(15, seed=3, shuffle=True, draw=draw_of([(10, 0.5), (5, 2.0)], seed=3))
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert len(sampler) == len(orders[0]) == 15
    assert sorted(item for item in orders[0] if item >= 10) == sorted([10, 11, 12, 13, 14] * 2)
    assert set(orders[0] + orders[1]) == set(range(15))
    assert [item >= 10 for item in orders[0]] != sorted(item >= 10 for item in orders[0])
    plain = EpochSampler(15, seed=3, shuffle=False, draw=draw_of([(10, 0.5), (5, 2.0)], shuffle=False))
    assert list(plain) == [*range(5), *range(10, 15), *range(10, 15)]
    balanced = Balance(5, 1, lambda item: item)
    even = EpochSampler(15, seed=3, shuffle=True, balanced=balanced, draw=draw_of([(10, 0.5), (5, 2.0)], seed=3))
    assert [sorted(list(even)[i : i + 5]) for i in (0, 5, 10)] == [sorted(orders[0][i : i + 5]) for i in (0, 5, 10)]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_without_weights_the_order_is_the_one_of_the_records(count: int) -> None:
    sampler = EpochSampler(count, seed=5, shuffle=True)
    assert list(sampler) == np.random.default_rng((5, 0)).permutation(count).tolist()


def _source(name: str, count: int, folder: Path, weight: float = 1.0) -> OpenSource:
    rows: list[dict[str, Any]] = [{"id": f"{name}{number}"} for number in range(count)]
    (folder / name).mkdir(exist_ok=True)
    return OpenSource(open_records(rows), ImageRoots([folder / name]), weight)


def test_each_record_is_read_with_the_image_folders_of_its_source(tmp_path: Path) -> None:
    mixture = RecordMixture([_source("a", 3, tmp_path), _source("b", 0, tmp_path), _source("c", 2, tmp_path)])
    found = [(mixture.records[index]["id"], mixture.roots_of(index).roots[0].name) for index in range(5)]
    assert found == [("a0", "a"), ("a1", "a"), ("a2", "a"), ("c0", "c"), ("c1", "c")]
    assert mixture.draw([0, 1, 4], seed=0, shuffle=True) is None


def test_held_out_and_skipped_records_are_never_drawn(tmp_path: Path) -> None:
    mixture = RecordMixture([_source("a", 6, tmp_path, 0.5), _source("b", 4, tmp_path, 2.0)])
    kept = [1, 2, 4, 5, 7, 9]  # 4 of the first source, 2 of the second
    draw = mixture.draw(kept, seed=0, shuffle=True)
    assert draw is not None
    assert len(draw) == 2 + 4
    items = draw(0).tolist()
    assert all(item < 4 for item in items[:2])
    assert sorted(items[2:]) == [4, 4, 5, 5]
