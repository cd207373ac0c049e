"""A tensor whose rows come from several tensors, which exists as a whole only where it is needed."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_COLUMNS = 512


class JoinedRows:
    """Rows of several tensors, one after the other, such as those of a file and new ones in memory.

    Args:
        *parts: Tensors of the same width, of any floating dtypes.
    """

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts
        self.shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def numel(self) -> int:
        """Return the number of elements."""
        return sum(part.numel() for part in self.parts)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return some of the rows in float32."""
        import torch

        found, first = [], 0
        for part in self.parts:
            here = part[max(0, start - first) : max(0, stop - first)]
            found.append(here.float())
            first += part.shape[0]
        return torch.cat(found)


def first_rows(stored: Tensor | JoinedRows, count: int) -> tuple[Tensor, ...]:
    """Return the first rows of a tensor or of joined rows, as views of their parts."""
    parts, found = stored.parts if isinstance(stored, JoinedRows) else (stored,), []
    for part in parts:
        found.append(part[:count])
        count -= len(found[-1])
    return tuple(found)


def read_rows(stored: Tensor | JoinedRows, start: int, stop: int) -> Tensor:
    """Return rows of a tensor in its own dtype, or of joined rows in float32."""
    return stored.rows(start, stop) if isinstance(stored, JoinedRows) else stored[start:stop]


def whole(stored: Tensor | JoinedRows) -> Tensor:
    """Return a tensor as it is, and joined rows as one tensor in float32."""
    return stored.rows(0, stored.shape[0]) if isinstance(stored, JoinedRows) else stored


def mean_row(rows: Tensor) -> Tensor:
    """Return the mean ``[1, D]`` of rows ``[N, D]`` in float32, without a copy of all of them in float32."""
    import torch

    width = rows.shape[1]
    # The rest belongs to the last part: a narrow part would be summed in another order.
    edges = [*range(0, max(1, width - _COLUMNS + 1), _COLUMNS), width]
    parts = [rows[:, left:right].float().mean(dim=0, keepdim=True) for left, right in pairwise(edges)]
    return torch.cat(parts, dim=1)
