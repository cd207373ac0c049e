"""Merge adapters into their base from disk to disk, block by block in fp32, without a model in memory.

``plan_merge`` opens and checks the inputs, and ``write_merged`` writes the result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavar_peft.atomic_files import write_json
from llavar_peft.constants import MODEL_TYPE
from llavar_peft.errors import ConfigError
from llavar_peft.weights.adapter.lora_updates import Adapter, read_adapter
from llavar_peft.weights.delta.released_layout import view_as_released
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.companion_files import PROCESSOR_FILE, copy_companion, find_companions
from llavar_peft.weights.io.folder_writer import FolderWriter, WeightsReport, check_outside
from llavar_peft.weights.io.hub_folders import find_folder
from llavar_peft.weights.io.shard_layout import RELEASED_SHARD_SIZE, TensorSpec, WeightsFormat
from llavar_peft.weights.io.stated_resolution import RESOLUTION
from llavar_peft.weights.io.tensor_table import check_dtype
from llavar_peft.weights.io.weights_fingerprint import check_adapter_base, take_fingerprint
from llavar_peft.weights.io.write_weights import Along, Progress, write_weights
from llavar_peft.weights.merge.merge_base import MergeBase, ReadLanguage, ReadTower, open_merge_base
from llavar_peft.weights.merge.merge_stream import MergedTensors, Onto, Rounding, choose_rounding


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A checked merge that has not been written yet.

    Attributes:
        merged: The tensors of the result.
        trained: How the base was quantized in training; None if it was not.
        folder: The folder of the base.
    """

    merged: MergedTensors
    trained: Rounding | None
    folder: Path


def plan_merge(  # noqa: PLR0913 - the options of the merge
    base: str | Path,
    adapter: str | Path | Sequence[str | Path],
    *,
    weights: Sequence[float] | None = None,
    onto: Onto | None = None,
    vision_tower: str | Path | None = None,
    projector: str | Path | None = None,
    force: bool = False,
    read_tower: ReadTower | None = None,
    read_language: ReadLanguage | None = None,
) -> MergePlan:
    """Open and check the inputs of a merge. The other arguments are those of ``models.merge_adapter.merge_adapter``.

    Args:
        read_tower: As for ``open_merge_base``.
        read_language: As for ``open_merge_base``.
    """
    folder = find_folder(base, "base")
    opened, adapters = open_merge(
        folder,
        adapter,
        in_sequence=weights is None,
        vision_tower=vision_tower,
        projector=projector,
        force=force,
        read_tower=read_tower,
        read_language=read_language,
    )
    trained, rounding = choose_rounding([opened_adapter.folder for opened_adapter in adapters], onto)
    return MergePlan(MergedTensors(opened, adapters, weights, rounding), trained, folder)


def open_merge(
    base: str | Path,
    adapter: str | Path | Sequence[str | Path],
    *,
    in_sequence: bool = True,
    vision_tower: str | Path | None = None,
    projector: str | Path | None = None,
    force: bool = False,
    read_tower: ReadTower | None = None,
    read_language: ReadLanguage | None = None,
) -> tuple[MergeBase, tuple[Adapter, ...]]:
    """Open and check a base and its adapters, as ``plan_merge`` does.

    Args:
        in_sequence: Whether each adapter may have been trained on the base with those before it merged into it.
    """
    folder = find_folder(base, "base")
    names = [adapter] if isinstance(adapter, (str, Path)) else adapter
    folders = [find_folder(name, "adapter") for name in names]
    if not folders:
        raise ConfigError.at("adapter", "no adapter (got 0, expected at least one)", "give an adapter's folder")
    # In a sequence the second adapter may have been trained on the base with the first one merged into it.
    checked = folders[:1] if in_sequence else folders
    if force:
        checked = []
    for checked_folder in checked:
        check_adapter_base(checked_folder, lambda: _fingerprint(folder), str(folder))
    adapters = tuple(read_adapter(adapter_folder) for adapter_folder in folders)
    opened = open_merge_base(
        folder,
        adapters,
        vision_tower=vision_tower,
        projector=projector,
        read_tower=read_tower,
        read_language=read_language,
    )
    by_our_name = ((opened.ours(name) or "", entry) for name, entry in opened.table.items())
    tower = {name: entry for name, entry in by_our_name if name.startswith(tensor_names.TOWER)}
    for checked_folder in checked if tower else ():
        where = f"the vision tower of {folder}"
        check_adapter_base(checked_folder, lambda: take_fingerprint(tower, {}), where, role="tower")
    return opened, adapters


def write_merged(
    plan: MergePlan,
    out: Path,
    *,
    dtype: str | None = None,
    form: WeightsFormat = "safetensors",
    shard_size: int = RELEASED_SHARD_SIZE,
    progress: Progress | None = None,
    check: Callable[[Path], None] | None = None,
    along: Along | None = None,
) -> WeightsReport:
    """Write the result of a merge.

    Args:
        plan: From ``plan_merge``.
        out: Folder to create.
        dtype: Torch's name of the result's dtype; None keeps each tensor's own.
        form: Format of the files.
        shard_size: Maximum size of a file in bytes.
        progress: Called after each tensor with the number of bytes written and the total.
        check: Called with the finished folder before it gets its name; if it raises, nothing is kept.
        along: A computation with the tensors while they are written.
    """
    merged, base = plan.merged, plan.merged.base
    check_dtype(dtype)
    check_outside(out, plan.folder, *(one.folder for one in merged.adapters))

    def finish(staged: Path) -> None:
        _write_companions(base, staged, dtype)
        if check is not None:
            check(staged)

    for folder in base.companions:
        find_companions(folder)  # a link out of a folder is found before anything is written
    specs = [TensorSpec(name, shape, dtype or base.dtype(name)) for name, shape in base.shapes.items()]
    key = repr([merged.identity(), merged.weights, merged.rounding, dtype])
    return write_weights(
        FolderWriter(out, specs, form=form, shard_size=shard_size, plan=key),
        lambda spec: merged.blocks(spec.name, spec.dtype),
        sources=lambda name: [base.table.get(name)],
        finish=finish,
        progress=progress,
        along=along,
    )


def _fingerprint(folder: Path) -> dict[str, Any]:
    view = view_as_released(folder)
    return take_fingerprint(view.table, view.config)


def _write_companions(base: MergeBase, staged: Path, dtype: str | None) -> None:
    """Write the configuration and copy the tokenizer and the other files of the model."""
    for folder in base.companions:
        for path in find_companions(folder):
            copy_companion(path, staged)
    config = dict(base.config)
    # The result is not quantized, even if the base was in training.
    config.pop("quantization_config", None)
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype or base.dtype(next(iter(base.table)))
    write_json(staged / "config.json", config)
    processor = staged / PROCESSOR_FILE
    if config.get("model_type") == MODEL_TYPE and processor.is_file():
        settings = json.loads(processor.read_text(encoding="utf-8"))
        if settings.get(RESOLUTION) != config.get(RESOLUTION):
            write_json(processor, {**settings, RESOLUTION: config.get(RESOLUTION)})
