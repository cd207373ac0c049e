"""The tensors of a base after adapters are merged into it, a block of rows at a time."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from llavar_peft.errors import ConfigError, Fault, MissingDependencyError, WeightsError
from llavar_peft.weights.adapter.adapter_files import read_base_settings
from llavar_peft.weights.adapter.adapter_layouts import adapter_files
from llavar_peft.weights.adapter.lora_updates import Adapter, Replacement, Update
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.tensor_blocks import join_first, raise_faults, read_blocks, rows_per_block, tensor_bytes
from llavar_peft.weights.io.tensor_table import TensorEntry, torch_dtype
from llavar_peft.weights.io.write_weights import identify_files
from llavar_peft.weights.merge.merge_base import MergeBase

if TYPE_CHECKING:
    from torch import Tensor

Onto = Literal["original", "dequantized"]
"""What adapters of a quantized base are added to: its values on disk, or those values after quantization."""

RowsCallback: TypeAlias = "Callable[[Tensor, int], None]"
"""Called with rows of a tensor, in fp32 and in memory that is used again, and with the number of the first of them."""
_MATRIX = 2  # dimensions
_PIECE = 1 << 17
"""Approximate number of elements of a piece of a block: 0.5 MiB in fp32."""
_PIECE_ROWS = 32
"""Fewest rows of a piece, for which BLAS has the same kernels as for more: the result does not depend on the pieces."""
_FIX = "use the adapter with the base it was trained on"


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a base was quantized in training.

    Attributes:
        kind: ``"nf4"`` with double quantization, or ``"int8"``.
        dtype: Torch's name of the dtype of the weights before quantization, and of the computation.
        quantized_from: That of the weights before quantization, where it is another one: the base was stored quantized.
    """

    kind: Literal["nf4", "int8"]
    dtype: str
    quantized_from: str | None = None

    def __post_init__(self) -> None:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingDependencyError.at(
                "onto=dequantized", "requires bitsandbytes, which is not installed", "pip install bitsandbytes"
            )

    def blocks(self, entry: TensorEntry) -> Iterator[Tensor]:
        """Yield blocks of a linear layer's weight after quantization, which needs the whole weight."""
        import torch

        weight = torch.empty(entry.shape, dtype=torch_dtype(self.quantized_from or self.dtype))
        start = 0
        for block in read_blocks(entry):
            weight[start : start + len(block)] = block
            start += len(block)
        rounded = self.apply(weight)
        del weight
        step = rows_per_block(entry.shape)
        for first in range(0, len(rounded), step):
            yield rounded[first : first + step]

    def apply(self, weight: Tensor) -> Tensor:
        """Quantize and dequantize a weight of shape (out, in) with bitsandbytes, as in training."""
        functional: Any = importlib.import_module("bitsandbytes.functional")
        if self.kind == "nf4":
            stored, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            state.dtype = torch_dtype(self.dtype)
            back: Tensor = functional.dequantize_4bit(stored, state)
            return back
        stored, scales, _ = functional.int8_vectorwise_quant(weight.half())  # requires fp16, in training too
        rounded: Tensor = functional.int8_vectorwise_dequant(stored, scales)
        return rounded


def _is_quantized(name: str, entry: TensorEntry) -> bool:
    """Return whether a tensor is stored in 4 or 8 bits in training: the matrices of the language model's layers.

    Tower, projector, embeddings and head are never quantized. Language models with matrices in their layers that are
    not quantized cannot be trained in 4 or 8 bits (``check_linear``).
    """
    return tensor_names.LAYER.search(name) is not None and len(entry.shape) == _MATRIX


def choose_rounding(adapters: Sequence[Path], onto: Onto | None) -> tuple[Rounding | None, Rounding | None]:
    """Return how the base of adapters was quantized in training, and how it is to be for a merge.

    Args:
        adapters: Their folders.
        onto: What the adapters are added to; None is what they were trained on.

    Returns:
        Both; None for a base that was not, or is not to be, quantized.

    Raises:
        ConfigError: The adapters were trained on differently stored bases, or ``"dequantized"`` was given and they
            were not trained on a quantized base.
    """
    bases = [read_base_settings(adapter) for adapter in adapters]
    ways_stored = {(base.quantize, base.dtype, base.quantized_from) for base in bases}
    if len(ways_stored) > 1:
        what = f"the adapters were trained on bases stored in different ways (got {sorted(map(str, ways_stored))})"
        raise ConfigError.at("adapter", what, "merge the adapters one by one")
    quantize, dtype, quantized_from = ways_stored.pop() if ways_stored else (None, "auto", None)
    trained = Rounding(quantize, "float32" if dtype == "auto" else dtype, quantized_from) if quantize else None
    if onto == "dequantized" and trained is None:
        got = f"{adapters[0]}, which was not trained on a quantized base or has no base.json" if adapters else "none"
        what = f"'dequantized' requires adapters of a quantized base (got {got})"
        raise ConfigError.at("onto", what, "omit this setting")
    return trained, None if onto == "original" else trained


class MergedTensors:
    """The tensors of a base after adapters are merged into it.

    Args:
        base: The base before the merge.
        adapters: In their order.
        weights: As for ``merge_adapter``.
        rounding: How the base's linear layers are quantized before the merge; None takes them as they are on disk.

    Raises:
        ConfigError: The number of weights is not that of the adapters.
        WeightsError: The base has no tensor for an update, or one of another shape.
    """

    def __init__(
        self,
        base: MergeBase,
        adapters: Sequence[Adapter],
        weights: Sequence[float] | None = None,
        rounding: Rounding | None = None,
    ) -> None:
        if weights is not None and len(weights) != len(adapters):
            what = f"wrong number of weights (got {len(weights)}, expected one for each of {len(adapters)} adapters)"
            raise ConfigError.at("weights", what, "give as many weights as adapters")
        self.base, self.adapters, self.weights, self.rounding = base, tuple(adapters), weights, rounding
        overlay = Adapter(Path("projector"), {}, base.overlay)
        check_updates([*adapters, overlay], {base.ours(name): shape for name, shape in base.shapes.items()})
        absent = [name for name in base.shapes if name not in base.table and name not in base.overlay]
        if weights is not None and absent:
            what = f"weights need all tensors in the base, which has no {absent[0]}"
            fix = "omit the weights, or give a whole LLaVAR, with the resolution of the adapters, as base"
            raise ConfigError.at("weights", what, fix)

    def blocks(self, name: str, dtype: str) -> Iterator[Tensor]:
        """Yield the blocks of a tensor after the merge, in the given dtype."""
        start = 0
        for block in self.before(name):
            yield self.merge_block(name, block, start, dtype)
            start += len(block)

    def merge_block(
        self,
        name: str,
        block: Tensor,
        start: int,
        dtype: str,
        before: RowsCallback | None = None,
        after: RowsCallback | None = None,
    ) -> Tensor:
        """Return a block of a tensor after the merge.

        It is merged in pieces that stay in a core's cache while they are used.

        Args:
            name: The tensor.
            block: From ``before``.
            start: Number of its first row.
            dtype: Torch's name of the result's dtype.
            before: Called with each piece before the merge.
            after: Called with each piece after the merge, as it is rounded.
        """
        import torch

        changes = self.changes(name)
        unchanged = not changes and block.dtype == torch_dtype(dtype)
        if unchanged and before is None and after is None:
            return block
        result = block if unchanged else torch.empty(block.shape, dtype=torch_dtype(dtype))
        for rows, place in float_pieces(block):
            if before is not None:
                before(rows, start + place.start)
            if not unchanged:
                result[place] = self.after(name, rows, start + place.start) if changes else block[place]
            if after is not None:
                after(rows if unchanged else rows.copy_(result[place]), start + place.start)
        return result

    def updates(self, name: str) -> list[tuple[int, Update]]:
        """Return the number of each adapter that changes a tensor, and its update."""
        our_name = self.base.ours(name) or ""
        return [
            (number, adapter.updates[our_name])
            for number, adapter in enumerate(self.adapters)
            if our_name in adapter.updates
        ]

    def changes(self, name: str) -> bool:
        """Return whether an adapter changes a tensor."""
        return bool(self.updates(name))

    def after(self, name: str, rows: Tensor, start: int) -> Tensor:
        """Return rows of a tensor after the merge.

        Args:
            name: The tensor.
            rows: Before the merge, in fp32; they may be overwritten.
            start: Number of the first of them.

        Returns:
            fp32, not rounded.
        """
        updates = self.updates(name)
        if self.weights is not None:
            total = rows.clone()
            for number, update in updates:
                total += self.weights[number] * (update.apply(rows, start) - rows)
            return total
        may_overwrite = True
        for _, update in updates:
            rows = update.apply(rows, start, overwrite=may_overwrite)
            may_overwrite = may_overwrite and not isinstance(update, Replacement)  # whose rows are the adapter's
        return rows

    def before(self, name: str) -> Iterator[Tensor]:
        """Yield the blocks of a tensor before the merge, in any dtype."""
        our_name, start = self.base.ours(name) or "", 0
        overlay = self.base.overlay.get(our_name)
        for block in self._read(name, our_name):
            yield block if overlay is None else overlay.apply(block.float(), start)
            start += len(block)

    def _read(self, name: str, our_name: str) -> Iterator[Tensor]:
        """Yield the blocks of the base's tensor, and of rows that are added to it."""
        import torch

        shape, entry = self.base.shapes[name], self.base.table.get(name)
        if entry is None:
            yield torch.zeros(shape)  # the projector, which an adapter or the projector file replaces
        elif self.rounding is not None and _is_quantized(our_name, entry):
            yield from self.rounding.blocks(entry)
        elif entry.shape == shape:
            yield from read_blocks(entry)
        else:
            yield from append_mean_rows(entry, shape[0])

    def identity(self) -> list[tuple[str, int, int]]:
        """Return path, size and time of every file that the result depends on, and the updates that are applied."""
        paths = [entry.path for entry in self.base.table.values()]
        for adapter in self.adapters:
            paths += adapter_files(adapter.folder)
        overlay = [(name, 0, zlib.crc32(tensor_bytes(update.value))) for name, update in self.base.overlay.items()]
        applied = [
            (str(adapter.folder), len(adapter.updates), zlib.crc32("\n".join(sorted(adapter.updates)).encode()))
            for adapter in self.adapters
        ]
        return [*identify_files(paths), *overlay, *applied]


def float_pieces(block: Tensor) -> Iterator[tuple[Tensor, slice]]:
    """Yield a block in pieces, each in fp32 in the same memory, with its place in the block."""
    import torch

    num_rows = len(block)
    num_pieces = max(1, min(-(-block.numel() // _PIECE), num_rows // _PIECE_ROWS))
    step = -(-num_rows // num_pieces)  # rows of a piece, rounded up to a multiple of 8
    step += -step % 8
    memory = torch.empty(min(step, num_rows), *block.shape[1:])
    for start in range(0, num_rows, step):
        place = slice(start, min(start + step, num_rows))
        yield memory[: place.stop - start].copy_(block[place]), place


def append_mean_rows(entry: TensorEntry, rows: int) -> Iterator[Tensor]:
    """Yield a tensor's blocks, and then additional rows that are the mean of all of its own, in fp32.

    Args:
        entry: The tensor.
        rows: Number of rows of the result.

    Raises:
        WeightsError: The tensor has more rows than that.

    Source: LLaVAR, llava/model/llava.py, ``initialize_vision_tokenizer``.
    """
    import torch

    if entry.shape[0] > rows:
        what = f"too many rows (got {entry.shape[0]}, expected at most {rows})"
        raise WeightsError.at(entry.location, what, "use the base that the adapter was trained on")
    total = torch.zeros(entry.shape[1:], dtype=torch.float64)
    for block in read_blocks(entry):
        total += block.sum(0, dtype=torch.float64)
        yield block
    mean = (total / entry.shape[0]).float()[None]
    yield mean.repeat(rows - entry.shape[0], *(1 for _ in entry.shape[1:]))


def check_updates(adapters: Sequence[Adapter], shapes: Mapping[str | None, tuple[int, ...]]) -> None:
    """Reject adapters whose updates do not fit the tensors of a base.

    Args:
        adapters: The adapters to merge.
        shapes: Shapes of the base's tensors, by our names.

    Raises:
        WeightsError: Names every update without a tensor in the base, or with one of another shape.
    """
    faults = []
    for adapter in adapters:
        unknown = [name for name in adapter.updates if name not in shapes]
        misfits = [
            f"{name} (the base's is {list(shapes[name])})"
            for name, update in adapter.updates.items()
            if name in shapes and not update.fits(shapes[name])
        ]
        for tensors, what in (
            (unknown, "tensors of the adapter are not in the base"),
            (misfits, "tensors of the adapter have another shape in the base"),
        ):
            if tensors:
                faults.append(Fault(str(adapter.folder), f"{len(tensors)} {what}: {join_first(tensors)}", _FIX))
    raise_faults(faults)
