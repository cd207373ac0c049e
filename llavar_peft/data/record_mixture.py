"""Several sources of records as one, and how often an epoch takes the records of each.

A source with weight w and n training records gives round(w n) items to an epoch, at least one. Its records are taken
in rounds: each once, in an order of this round, before any is taken again. The next epoch continues where the last one
stopped, so that a weight below 1 reaches all records too. With weight 1, an epoch has each once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final

import numpy as np

from llavar_peft.data.record_store import RecordStore

if TYPE_CHECKING:
    import numpy.typing as npt

    from llavar_peft.data.image_roots import ImageRoots

    Positions = npt.NDArray[np.int64]

_ROUND_STREAM: Final = 0x317  # distinguishes these draws from others with the run's seed


@dataclass(frozen=True, slots=True)
class OpenSource:
    """Records with their image folders, and their weight in an epoch."""

    records: RecordStore
    roots: ImageRoots
    weight: float = 1.0


class RecordMixture:
    """The records of several sources, one after the other.

    Attributes:
        sources: The sources, in the order of the recipe.
        records: Their records.
    """

    def __init__(self, sources: Sequence[OpenSource]) -> None:
        self.sources = tuple(sources)
        self.records = RecordStore([part for source in sources for part in source.records.parts])
        self.starts = tuple(accumulate((len(source.records) for source in sources), initial=0))

    def roots_of(self, index: int) -> ImageRoots:
        """Return the image folders of a record of ``records``."""
        return self.sources[self._source_of(index)].roots

    def draw(self, indices: Sequence[int] | Positions, *, seed: int, shuffle: bool) -> EpochDraw | None:
        """Return what an epoch takes of some records; None if it takes each of them once.

        Args:
            indices: The indices of the records, in ascending order.
            seed: Seed of the run.
            shuffle: False takes the records of each source in their order.
        """
        weights = [source.weight for source in self.sources]
        if all(weight == 1 for weight in weights):
            return None
        edges = np.searchsorted(np.asarray(indices), self.starts)
        return EpochDraw(list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)), weights, seed, shuffle)

    def _source_of(self, index: int) -> int:
        return bisect_right(self.starts, index) - 1


class EpochDraw:
    """Which items an epoch takes, source by source. It depends on (seed, epoch) alone.

    Args:
        groups: First item and end of each source.
        weights: The weights of the sources.
        seed: Seed of the run.
        shuffle: Whether each round of a source has an order of its own.
    """

    def __init__(self, groups: Sequence[tuple[int, int]], weights: Sequence[float], seed: int, shuffle: bool) -> None:
        self.groups = tuple(groups)
        self.weights = tuple(weights)
        self.seed = seed
        self.shuffle = shuffle
        self._counts = [count_taken(end - first, weight) for (first, end), weight in zip(groups, weights, strict=True)]

    def __len__(self) -> int:
        return sum(self._counts)

    def __call__(self, epoch: int) -> Positions:
        """Return the items of an epoch, counted from 0; those of a source follow each other."""
        return np.concatenate([self._take(number, epoch) for number in range(len(self.groups))])

    def _take(self, number: int, epoch: int) -> Positions:
        """Return the items that an epoch takes of one source."""
        first, end = self.groups[number]
        size, count = end - first, self._counts[number]
        if count == size:
            return np.arange(first, end)
        if not count:
            return np.arange(0)
        # Counted from the first item of the first epoch.
        begin, stop = epoch * count, (epoch + 1) * count
        rounds = range(begin // size, -(-stop // size))
        items = np.concatenate([self._order_of_round(number, round_number, size) for round_number in rounds])
        return first + items[begin - rounds[0] * size : stop - rounds[0] * size]

    def _order_of_round(self, number: int, round_number: int, size: int) -> Positions:
        """Return the order in which a round takes the records of a source, counted from 0."""
        if not self.shuffle:
            return np.arange(size)
        return np.random.default_rng((self.seed, _ROUND_STREAM, number, round_number)).permutation(size)


def count_taken(records: int, weight: float) -> int:
    """Return the number of items that an epoch takes of a source."""
    return max(1, round(weight * records)) if records else 0
