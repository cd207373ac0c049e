"""Adapters merged into their base from disk to disk, block by block in fp32, without a model in memory."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llavar_peft.durable import write_json
from llavar_peft.errors import ConfigError, Fault, WeightsError
from llavar_peft.weights.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_FILE
from llavar_peft.weights.blocks import blame, count_not_finite, read_blocks, tensor_bytes, where_of
from llavar_peft.weights.fingerprint import take_fingerprint
from llavar_peft.weights.layout import RELEASED_SHARD_SIZE, TensorSpec, WeightsFormat
from llavar_peft.weights.merge_base import MergeBase, open_merge_base, read_base_settings
from llavar_peft.weights.pairing import FINGERPRINT_FILE, check_adapter_base
from llavar_peft.weights.released import view_as_released
from llavar_peft.weights.rounding import Rounding, is_rounded
from llavar_peft.weights.store import BIN_INDEX, SAFE_INDEX
from llavar_peft.weights.stream import Progress, stream
from llavar_peft.weights.table import CHECKSUMS_FILE, TensorEntry, torch_dtype
from llavar_peft.weights.updates import Adapter, Update, read_adapter
from llavar_peft.weights.writer import FolderWriter, WeightsReport

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 6
_COMPANIONS = ("*.json", "*.model", "*.jinja", "*.txt")


Onto = Literal["original", "dequantized"]
"""What adapters of a quantized base are added to: its numbers on disk, or what quantization made of them."""


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A merge that is about to be made.

    Attributes:
        merged: The tensors of the result.
        trained: How the base was quantized in training, if it was.
    """

    merged: MergedTensors
    trained: Rounding | None


def choose_rounding(adapters: Sequence[Path], onto: Onto | None) -> tuple[Rounding | None, Rounding | None]:
    """How the base of adapters was quantized in training, and how it is to be for a merge.

    Args:
        adapters: Their folders.
        onto: None is what the adapters were trained on.

    Returns:
        Both; None where it was not, or is not to be.

    Raises:
        ConfigError: The adapters were trained on differently stored bases, or ``"dequantized"`` is asked for and they
            were not trained on a quantized one.
    """
    kinds = {(settings.quantize, settings.dtype) for settings in map(read_base_settings, adapters)}
    if len(kinds) > 1:
        what = f"the adapters were trained on bases stored in different ways ({sorted(map(str, kinds))})"
        raise ConfigError.at("adapter", what, "merge them one by one")
    quantize, dtype = kinds.pop() if kinds else (None, "auto")
    trained = Rounding(quantize, "float32" if dtype == "auto" else dtype) if quantize else None
    if onto == "dequantized" and trained is None:
        what = f"{adapters[0] if adapters else 'nothing'} was not trained on a quantized base, or does not say so"
        raise ConfigError.at("onto", what, "leave it out")
    return trained, None if onto == "original" else trained


def plan_merge(
    base: str | Path,
    adapter: str | Path | Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    onto: Onto | None = None,
    vision_tower: str | Path | None = None,
    projector: str | Path | None = None,
    force: bool = False,
) -> MergePlan:
    """Opens what a merge reads, and checks it. Parameters as of ``models.merging.merge_adapter``."""
    folder = Path(base)
    folders = [Path(adapter)] if isinstance(adapter, (str, Path)) else [Path(one) for one in adapter]
    if not folders:
        raise ConfigError.at("adapter", "none is given", "give at least one adapter's folder")
    # One after another, the second may have been trained on what the first made of the base.
    for one in () if force else folders if weights is not None else folders[:1]:
        check_adapter_base(one, lambda: _fingerprint(folder), str(folder))
    adapters = tuple(read_adapter(one) for one in folders)
    opened = open_merge_base(folder, adapters, vision_tower=vision_tower, projector=projector)
    trained, rounding = choose_rounding(folders, onto)
    return MergePlan(MergedTensors(opened, adapters, weights, rounding), trained)


def write_merged(
    plan: MergePlan,
    out: Path,
    *,
    dtype: str | None = None,
    form: WeightsFormat = "safetensors",
    shard_size: int = RELEASED_SHARD_SIZE,
    progress: Progress | None = None,
    look: Callable[[Path], None] | None = None,
) -> WeightsReport:
    """Writes a merge's result. Parameters as of ``models.merging.merge_adapter``.

    Args:
        plan: What to write.
        out: Folder to make.
        dtype: Of the result.
        form: Of its files.
        shard_size: Of its files.
        progress: Told of its progress.
        look: Called with the finished folder before it gets its name; what it raises leaves nothing behind.

    Returns:
        What was written.
    """
    merged, base = plan.merged, plan.merged.base
    specs = [TensorSpec(name, shape, dtype or base.dtype(name)) for name, shape in base.shapes.items()]
    key = repr([merged.identity(), merged.weights, merged.rounding, dtype])
    writer = FolderWriter(out, specs, form=form, shard_size=shard_size, plan=key)

    def checked(spec: TensorSpec) -> Iterator[Tensor]:
        for block in merged.blocks(spec.name, spec.dtype):
            if count_not_finite(block):
                raise blame(spec.name, base.table.get(spec.name))
            yield block

    stream(writer, {spec.name: partial(checked, spec) for spec in specs}, progress)
    staged = writer.finish()
    _write_companions(base, staged, dtype)
    if look is not None:
        try:
            look(staged)
        except BaseException:
            writer.discard()
            raise
    return writer.settle()


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
            what = f"not one for each adapter (got {len(weights)}, wanted {len(adapters)})"
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
            where_of(entry), f"too many rows (got {entry.shape[0]}, wanted {rows})", "use its own base"
        )
    total = torch.zeros(entry.shape[1:], dtype=torch.float64)
    for block in read_blocks(entry):
        total += block.sum(0, dtype=torch.float64)
        yield block
    yield (total / entry.shape[0]).float().expand(rows - entry.shape[0], -1)


def check_landing(adapters: Sequence[Adapter], shapes: Mapping[str | None, tuple[int, ...]]) -> None:
    """Refuses adapters that were not trained on a base of this shape.

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


def _fingerprint(folder: Path) -> dict[str, Any]:
    view = view_as_released(folder)
    return take_fingerprint(view.table, view.config)


def _write_companions(base: MergeBase, staged: Path, dtype: str | None) -> None:
    weights = {BIN_INDEX, SAFE_INDEX, CHECKSUMS_FILE, ADAPTER_CONFIG, BASE_FILE, FINGERPRINT_FILE}
    for folder in base.companions:
        for pattern in _COMPANIONS:
            for path in sorted(folder.glob(pattern)):
                if path.name not in weights:
                    shutil.copyfile(path, staged / path.name)
    config = dict(base.config)
    # The result is not quantized, whatever the adapter was trained on.
    config.pop("quantization_config", None)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype or base.dtype(next(iter(base.table)))
    write_json(staged / "config.json", config)
