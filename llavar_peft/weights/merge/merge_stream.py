"""A base's tensors as adapters change them, a block of rows at a time."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llavar_peft.errors import ConfigError, Fault, WeightsError
from llavar_peft.weights.adapter.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llavar_peft.weights.adapter.lora_updates import Adapter, Update
from llavar_peft.weights.io.tensor_blocks import read_blocks, tensor_bytes, tensor_location
from llavar_peft.weights.io.tensor_table import TensorEntry, torch_dtype
from llavar_peft.weights.merge.merge_base import MergeBase
from llavar_peft.weights.merge.quantized_rounding import Rounding, is_rounded

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 6


class MergedTensors:
    """The tensors of a base as adapters change them.

    Args:
        base: Before the merge.
        adapters: In their order.
        weights: As ``merge_adapter`` takes them.
        rounding: What the base's linear layers went through when the adapters were trained; None takes them as they
            are on disk.

    Raises:
        ConfigError: Not one weight for each adapter.
        WeightsError: An update that does not land on a tensor of the base, or does not fit it.
    """

    def __init__(
        self,
        base: MergeBase,
        adapters: Sequence[Adapter],
        weights: Sequence[float] | None = None,
        rounding: Rounding | None = None,
    ) -> None:
        if weights is not None and len(weights) != len(adapters):
            what = f"not one for each adapter (got {len(weights)}, expected {len(adapters)})"
            raise ConfigError.at("weights", what, "give as many weights as adapters")
        self.base, self.adapters, self.weights, self.rounding = base, tuple(adapters), weights, rounding
        overlay = Adapter(Path("projector"), {}, base.overlay)
        check_landing([*adapters, overlay], {base.ours(name): shape for name, shape in base.shapes.items()})
        if weights is not None and not set(base.shapes) - set(base.table) <= {*base.overlay}:
            what = "there is no projector to weigh theirs against in a plain language model"
            raise ConfigError.at("weights", what, "leave the weights out, or give the whole LLaVAR as base")

    def blocks(self, name: str, dtype: str) -> Iterator[Tensor]:
        """A tensor after the merge.

        Args:
            name: As in the base's shapes.
            dtype: Of the result.

        Yields:
            Blocks of its rows, from first to last.
        """
        key, start = self.base.ours(name) or "", 0
        updates = [(number, one.updates[key]) for number, one in enumerate(self.adapters) if key in one.updates]
        for block in self.before(name):
            rows = self._merged(block.float(), updates, start) if updates else block
            start += len(block)
            yield rows.to(torch_dtype(dtype))

    def before(self, name: str) -> Iterator[Tensor]:
        """A tensor as the adapters find it.

        Args:
            name: As in the base's shapes.

        Yields:
            Blocks of its rows, from first to last, in any dtype.
        """
        key, start = self.base.ours(name) or "", 0
        overlay = self.base.overlay.get(key)
        for block in self._stored(name, key):
            yield block if overlay is None else overlay.applied(block.float(), start)
            start += len(block)

    def _stored(self, name: str, key: str) -> Iterator[Tensor]:
        """Blocks of the base's tensor, and of the rows that it is to have besides."""
        import torch

        shape, entry = self.base.shapes[name], self.base.table.get(name)
        if entry is None:
            yield torch.zeros(shape)  # the projector: what the adapters trained replaces it
        elif self.rounding is not None and is_rounded(key):
            yield from self.rounding.blocks(entry)
        elif entry.shape == shape:
            yield from read_blocks(entry)
        else:
            yield from with_mean_rows(entry, shape[0])

    def _merged(self, rows: Tensor, updates: Sequence[tuple[int, Update]], start: int) -> Tensor:
        if self.weights is None:
            for _, update in updates:
                rows = update.applied(rows, start)
            return rows
        total = rows.clone()
        for number, update in updates:
            total += self.weights[number] * (update.applied(rows, start) - rows)
        return total

    def identity(self) -> list[tuple[str, int, int]]:
        """Path, size and time of every file that the result depends on."""
        files = {entry.path.resolve() for entry in self.base.table.values()}
        for adapter in self.adapters:
            files |= {(adapter.folder / name).resolve() for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)}
        overlaid = [(name, 0, zlib.crc32(tensor_bytes(one.value))) for name, one in self.base.overlay.items()]
        return [*((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)), *overlaid]


def with_mean_rows(entry: TensorEntry, rows: int) -> Iterator[Tensor]:
    """A tensor's blocks, and then rows that are the mean of all of its own.

    Args:
        entry: Where it lies.
        rows: How many the result has.

    Yields:
        Blocks of rows; the last one, of the new rows, in fp32.

    Raises:
        WeightsError: It has more rows than that.

    Source: LLaVAR, llava/model/llava.py, ``initialize_vision_tokenizer``.
    """
    import torch

    if entry.shape[0] > rows:
        raise WeightsError.at(
            tensor_location(entry), f"too many rows (got {entry.shape[0]}, expected {rows})", "use its own base"
        )
    total = torch.zeros(entry.shape[1:], dtype=torch.float64)
    for block in read_blocks(entry):
        total += block.sum(0, dtype=torch.float64)
        yield block
    yield (total / entry.shape[0]).float().expand(rows - entry.shape[0], -1)


def check_landing(adapters: Sequence[Adapter], shapes: Mapping[str | None, tuple[int, ...]]) -> None:
    """Reject adapters that were not trained on a base of this shape.

    Args:
        adapters: To be merged.
        shapes: Of the base's tensors, by our names.

    Raises:
        WeightsError: Names every update that has no tensor of the base to land on, or does not fit it.
    """
    faults = []
    for adapter in adapters:
        where = str(adapter.folder)
        lost = [name for name in adapter.updates if name not in shapes]
        bad = [
            f"{name} (the base's is {list(shapes[name])})"
            for name, update in adapter.updates.items()
            if name in shapes and not update.fits(shapes[name])
        ]
        for found, what in (
            (lost, "of its tensors have none in the base"),
            (bad, "of its tensors do not fit the base's"),
        ):
            if found:
                more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
                text = f"{len(found)} {what}: {', '.join(found[:_SHOWN])}{more}"
                faults.append(Fault(where, text, "use it on the base it was trained on"))
    if faults:
        raise WeightsError("\n".join(map(str, faults)), faults)
