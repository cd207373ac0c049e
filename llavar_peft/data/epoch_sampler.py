"""The order of the records in an epoch, and which of them share a forward pass.

Randomness depends on (seed, epoch) only: the order is the same for any number of ranks, workers and restarts.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from llavar_peft.data.record_mixture import EpochDraw


class Balance:
    """Rearranges each optimizer step so that its micro batches have about the same number of tokens.

    A step keeps its records and the size of its micro batches. Ranks that wait for each other get micro batches of
    similar size, because the largest ones come first.

    Args:
        step: Records of an optimizer step, over all ranks.
        micro: Records of a micro batch; a divisor of ``step``.
        size: Returns the approximate number of tokens of an item.
    """

    def __init__(self, step: int, micro: int, size: Callable[[int], int]) -> None:
        self.step = step
        self.micro = micro
        self.size = size

    def __call__(self, order: Sequence[int]) -> Iterator[int]:
        """Yield the items of an epoch, rearranged one step at a time. A smaller last step keeps its order."""
        for start in range(0, len(order), self.step):
            items = order[start : start + self.step]
            if len(items) < self.step:
                yield from items
                continue
            sizes = [self.size(item) for item in items]
            for indices in balance_bins(sizes, self.step // self.micro, capacity=self.micro):
                yield from (items[index] for index in indices)


class EpochSampler(Sampler[int]):
    """Draws the order of each epoch from (seed, epoch).

    Args:
        count: Number of items.
        seed: Seed of the run.
        shuffle: False keeps the order of the data in every epoch.
        balanced: Rearranges the items of each optimizer step; None keeps the drawn order.
        draw: Which items an epoch takes; None takes each once.
    """

    def __init__(
        self,
        count: int,
        *,
        seed: int,
        shuffle: bool,
        balanced: Balance | None = None,
        draw: EpochDraw | None = None,
    ) -> None:
        self.count = count
        self.seed = seed
        self.shuffle = shuffle
        self.balanced = balanced
        self.draw = draw
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the next epoch, counted from 0."""
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return self.count if self.draw is None else len(self.draw)

    def __iter__(self) -> Iterator[int]:
        taken = np.arange(self.count) if self.draw is None else self.draw(self.epoch)
        if not self.shuffle:
            return iter(taken.tolist())
        order = np.random.default_rng((self.seed, self.epoch)).permutation(taken).tolist()
        return iter(order) if self.balanced is None else self.balanced(order)


def balance_bins(sizes: Sequence[int], bins: int, *, capacity: int) -> list[list[int]]:
    """Distribute items over bins so that the largest sum of sizes is nearly as small as possible.

    Items are assigned in descending size to the bin with the smallest sum. Then the bin with the largest sum swaps
    single items with other bins as long as this helps. For steps of 32 records with the lengths of LLaVA-Instruct the
    result is within 1 % of the optimum.

    Args:
        sizes: Size of each item.
        bins: Number of bins.
        capacity: Maximum number of items in a bin.

    Returns:
        The indices of each bin's items in ascending order; the bin with the largest sum first.
    """
    filled: list[list[int]] = [[] for _ in range(bins)]
    sums = [0] * bins
    open_bins = [(0, number) for number in range(bins)]
    for index in _by_descending_size(sizes):
        _, number = heapq.heappop(open_bins)
        filled[number].append(index)
        sums[number] += sizes[index]
        if len(filled[number]) < capacity:
            heapq.heappush(open_bins, (sums[number], number))
    while (swap := _best_swap(sizes, filled, sums)) is not None:
        mine, theirs = filled[swap.fullest][swap.place], filled[swap.other][swap.other_place]
        filled[swap.fullest][swap.place], filled[swap.other][swap.other_place] = theirs, mine
        sums[swap.fullest] -= sizes[mine] - sizes[theirs]
        sums[swap.other] += sizes[mine] - sizes[theirs]
    return [sorted(filled[number]) for number in sorted(range(bins), key=lambda number: (-sums[number], number))]


def bins_under_limit(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Distribute items over few bins whose sums stay within a limit: first fit, in descending size.

    Args:
        sizes: Size of each item. An item above the limit gets its own bin.
        limit: Maximum sum of the sizes in a bin.

    Returns:
        The indices of each bin's items in ascending order.
    """
    filled: list[list[int]] = []
    sums: list[int] = []
    for index in _by_descending_size(sizes):
        fitting = (number for number, total in enumerate(sums) if total + sizes[index] <= limit)
        number = next(fitting, len(filled))
        if number == len(filled):
            filled.append([])
            sums.append(0)
        filled[number].append(index)
        sums[number] += sizes[index]
    return [sorted(indices) for indices in filled]


def _by_descending_size(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))


class _Swap(NamedTuple):
    """An exchange of an item of the fullest bin with an item of another one, each by its place in its bin."""

    fullest: int
    place: int
    other: int
    other_place: int


def _best_swap(sizes: Sequence[int], filled: Sequence[Sequence[int]], sums: Sequence[int]) -> _Swap | None:
    """Return the swap between the fullest bin and another one that gives the smallest maximum; None if none helps."""
    fullest = max(range(len(sums)), key=sums.__getitem__)
    best: _Swap | None = None
    smallest_maximum = sums[fullest]
    for other in range(len(sums)):
        gap = sums[fullest] - sums[other]
        for place, item in enumerate(filled[fullest]):
            for other_place, other_item in enumerate(filled[other]):
                difference = sizes[item] - sizes[other_item]
                if not 0 < difference < gap:
                    continue  # neither bin may become as full as the fullest one is
                maximum = max(sums[fullest] - difference, sums[other] + difference)
                if maximum < smallest_maximum:
                    best, smallest_maximum = _Swap(fullest, place, other, other_place), maximum
    return best
