"""The weights of a base with unmerged adapters, and of the result of their merge, a block of rows at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from llavar_peft.weights.adapter.lora_updates import LayerInput, LowRank
from llavar_peft.weights.io.tensor_stream import TensorStream
from llavar_peft.weights.merge.merge_stream import MergedTensors, float_pieces


class Weights(ABC):
    """Read access to a model on disk, a block of rows at a time, in float32 under this package's names.

    Args:
        merged: A merge, whose tensors the model has before it and after it.
    """

    def __init__(self, merged: MergedTensors) -> None:
        self.merged = merged
        to_ours = merged.base.ours
        self.stored = {our_name: name for name in merged.base.shapes if (our_name := to_ours(name)) is not None}

    @abstractmethod
    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's rows in consecutive blocks."""

    def has(self, name: str) -> bool:
        """Return whether there is such a tensor."""
        return name in self.stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.merged.base.shapes[self.stored[name]]

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Return a linear layer's output without its bias."""
        layer_input = LayerInput(x)
        return join_columns(layer_input, [layer_input.times(block) for block in self.blocks(name)])

    def tensor(self, name: str) -> Tensor:
        """Return a complete tensor, which should be small."""
        return torch.cat(list(self.blocks(name)))

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Return rows of a tensor, shape (len(ids), width)."""
        picked, start = PickedRows(ids), 0
        for block in self.blocks(name):
            picked.add(picked.pick(block, start))
            start += len(block)
        return picked.joined()


def join_columns(x: LayerInput, columns: list[Tensor]) -> Tensor:
    """Return a linear layer's whole output from its columns, shape (..., out)."""
    output = torch.cat(columns, dim=-1)
    return output.reshape(*x.shape, output.shape[-1])


class PickedRows:
    """Rows of a tensor that are picked from its blocks.

    Args:
        ids: Numbers of the rows, in any order.
    """

    def __init__(self, ids: Tensor) -> None:
        self._order = ids.argsort()
        self._sorted_ids = ids[self._order]
        self._picked: list[Tensor] = []

    def inside(self, block: Tensor, start: int) -> Tensor:
        """Return the numbers of the picked rows that are in a block, in ascending order."""
        return self._sorted_ids[(self._sorted_ids >= start) & (self._sorted_ids < start + len(block))]

    def pick(self, block: Tensor, start: int) -> Tensor:
        """Return the picked rows that are in a block."""
        return block[self.inside(block, start) - start]

    def add(self, rows: Tensor) -> None:
        """Keep the picked rows of a block; the blocks follow each other from the first to the last."""
        self._picked.append(rows)

    def joined(self) -> Tensor:
        """Return the rows in the order of the ids."""
        return torch.cat(self._picked)[self._order.argsort()]


class UnmergedWeights(Weights):
    """A base with unmerged adapters, as it was trained; the base is quantized as the merge's rounding says.

    Nothing here uses what merges the adapters, so that an error there makes a difference.
    """

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's rows in consecutive blocks."""
        start = 0
        for block in self.merged.before(self.stored[name]):
            yield self.lookup(name, block.float(), torch.arange(start, start + len(block)))
            start += len(block)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """Return a linear layer's output, with the adapters computed as peft computes them before a merge."""
        layer_input, columns, start = LayerInput(x), [], 0
        for block in self.merged.before(self.stored[name]):
            for rows, place in float_pieces(block):
                columns.append(self.output(name, layer_input, rows, start + place.start))
            start += len(block)
        return join_columns(layer_input, columns)

    def output(self, name: str, x: LayerInput, rows: Tensor, start: int) -> Tensor:
        """Return some columns of a linear layer's output.

        Args:
            name: The layer's weight.
            x: Its input.
            rows: Rows of the weight before the merge, fp32.
            start: Number of the first of them.
        """
        base_output = output = x.times(rows)
        updates, weights = self.merged.updates(self.stored[name]), self.merged.weights
        for place, (number, update) in enumerate(updates):
            moved = update.output(x, output if weights is None else base_output, rows, start)
            if weights is not None:
                output = output + weights[number] * (moved - base_output)
                continue
            output = moved
            if any(isinstance(later, LowRank) and later.magnitude is not None for _, later in updates[place + 1 :]):
                rows = update.lookup(rows, torch.arange(start, start + len(rows)))  # whose lengths DoRA needs
        return output

    def lookup(self, name: str, rows: Tensor, numbers: Tensor) -> Tensor:
        """Return rows of a tensor with the unmerged adapters.

        Args:
            name: The tensor.
            rows: Rows of it before the merge, fp32.
            numbers: Their numbers in the tensor.
        """
        updates, weights = self.merged.updates(self.stored[name]), self.merged.weights
        updated = rows
        for number, update in updates:
            if weights is None:
                updated = update.lookup(updated, numbers)
            else:
                updated = updated + weights[number] * (update.lookup(rows, numbers) - rows)
        return updated


class WrittenWeights(Weights):
    """The result of a merge that is being written; what is not written yet is written when it is read.

    Args:
        merged: The merge.
        stream: Writes it.
    """

    def __init__(self, merged: MergedTensors, stream: TensorStream) -> None:
        super().__init__(merged)
        self._stream = stream

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor's rows in consecutive blocks."""
        yield from (block.float() for block in self._stream.blocks(self.stored[name]))
