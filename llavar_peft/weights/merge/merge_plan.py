"""Adapters merged into their base from disk to disk, block by block in fp32, without a model in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llavar_peft.atomic_files import write_json
from llavar_peft.errors import ConfigError
from llavar_peft.weights.adapter.adapter_files import ADAPTER_CONFIG, BASE_FILE
from llavar_peft.weights.adapter.lora_updates import read_adapter
from llavar_peft.weights.base_check import FINGERPRINT_FILE, check_adapter_base
from llavar_peft.weights.delta.released_layout import view_as_released
from llavar_peft.weights.io.folder_writer import FolderWriter, WeightsReport
from llavar_peft.weights.io.open_weights import BIN_INDEX, SAFE_INDEX
from llavar_peft.weights.io.shard_layout import RELEASED_SHARD_SIZE, TensorSpec, WeightsFormat
from llavar_peft.weights.io.stream_tensors import Progress, stream
from llavar_peft.weights.io.tensor_blocks import count_not_finite, locate_fault
from llavar_peft.weights.io.tensor_table import CHECKSUMS_FILE
from llavar_peft.weights.merge.merge_base import MergeBase, open_merge_base, read_base_settings
from llavar_peft.weights.merge.merge_stream import MergedTensors
from llavar_peft.weights.merge.quantized_rounding import Rounding
from llavar_peft.weights.weights_fingerprint import take_fingerprint

if TYPE_CHECKING:
    from torch import Tensor

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
    """Open what a merge reads, and checks it. Parameters as of ``models.merging.merge_adapter``."""
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
    """Write a merge's result. Parameters as of ``models.merging.merge_adapter``.

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
                raise locate_fault(spec.name, base.table.get(spec.name))
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
