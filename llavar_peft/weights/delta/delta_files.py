"""The released delta format, in which LLaVAR's weights are published: make and apply, without a model in memory.

Source: LLaVAR, llava/model/make_delta.py and llava/model/apply_delta.py. In fp16, tensor by tensor:
delta = target - base and target = base + delta. Rows of ``embed_tokens`` and ``lm_head`` that the base does not have,
the projector, and our cross-attention hold the target's values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.atomic_files import write_text
from llavar_peft.errors import ConfigError
from llavar_peft.types import expand_home
from llavar_peft.weights.adapter.lora_updates import read_adapter
from llavar_peft.weights.delta.delta_base_check import check_delta_base, check_matching_tensors, with_head_of
from llavar_peft.weights.delta.flat_settings import is_released_format
from llavar_peft.weights.delta.released_layout import (
    ReleasedView,
    check_not_delta,
    check_original_tower,
    copy_companions,
    find_tokenizer,
    is_delta,
    read_model_config,
    view_as_released,
)
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.folder_writer import FolderWriter, WeightsReport, check_outside
from llavar_peft.weights.io.hub_folders import find_folder
from llavar_peft.weights.io.shard_layout import RELEASED_SHARD_SIZE, TensorSpec, WeightsFormat
from llavar_peft.weights.io.tensor_blocks import read_blocks
from llavar_peft.weights.io.tensor_table import torch_dtype
from llavar_peft.weights.io.weights_card import portable_name, write_weights_card
from llavar_peft.weights.io.weights_fingerprint import FINGERPRINT_FILE, check_adapter_base, take_fingerprint
from llavar_peft.weights.io.write_weights import Progress, identify_files, write_weights
from llavar_peft.weights.merge.merge_base import MergeBase, released_merge_base
from llavar_peft.weights.merge.merge_stream import MergedTensors, Onto, choose_rounding

if TYPE_CHECKING:
    from torch import Tensor

_NORM = "model.norm.weight"
"""Released name of the last RMS norm."""


def make_delta(
    base: str | Path,
    target: str | Path,
    out: str | Path,
    *,
    adapter: str | Path | Sequence[str | Path] = (),
    onto: Onto | None = None,
    form: WeightsFormat = "bin",
    shard_size: int = RELEASED_SHARD_SIZE,
    progress: Progress | None = None,
) -> WeightsReport:
    """Write target - base in the released format; for LLaMA, bit-equal to the original's ``make_delta``.

    Never holds more than a few blocks of a tensor. If it was killed or the disk was full, the same call resumes.

    Args:
        base: Folder of the language model, for example LLaMA-13B.
        target: Folder of a model with images made from it: a checkpoint of ours, or one in the released layout.
        out: Folder to create.
        adapter: Folder of one adapter, or of several, that are merged into the target one after another: the delta is
            that of the merged model, which is not written itself. With one adapter, the target may be the
            plain language model that it was trained on.
        onto: For adapters of a quantized base, as for ``merge_adapter``.
        form: ``"bin"``, as released, or ``"safetensors"``.
        shard_size: Maximum size of a file in bytes.
        progress: Called after each tensor with the number of bytes written and the total.

    Raises:
        ConfigError: A folder is not of the expected kind, or ``out`` exists.
        WeightsError: Tensors do not fit each other, are damaged or not finite.
        InterruptedRunError: Ctrl-C.
        EnvironmentFaultError: The disk is full, or another process is writing the same folder.
    """
    base_view, target_view = view_as_released(base), view_as_released(target)
    names = [adapter] if isinstance(adapter, (str, Path)) else adapter
    folders = [find_folder(name, "adapter") for name in names]
    check_outside(expand_home(out), base_view.folder, target_view.folder, *folders)
    _check_roles(base_view, target_view, adapters=bool(folders))
    check_original_tower(read_model_config(target_view.folder), target_view.folder)
    base_view = with_head_of(base_view, target_view)
    check_matching_tensors(base_view, target_view)
    for folder in folders[:1]:
        check_adapter_base(folder, lambda: take_fingerprint(target_view.table, target_view.config), str(target))
    adapters = [read_adapter(folder) for folder in folders]
    _, rounding = choose_rounding(folders, onto)
    merged = MergedTensors(released_merge_base(target_view, adapters), adapters, rounding=rounding)
    prints = {"base": take_fingerprint(base_view.table, base_view.config)}
    if not folders:  # the fingerprint of a merged model is not known before the merge
        prints["target"] = take_fingerprint(target_view.table, target_view.config)
    flat = dict(merged.base.config)
    specs = [TensorSpec(name, shape, _dtype(merged.base, flat, name)) for name, shape in merged.base.shapes.items()]
    dtypes = {spec.name: spec.dtype for spec in specs}
    plan = repr((merged.identity(), rounding, _identity(base_view, target_view)))
    # The tokenizer of an adapter has the image tokens, that of its plain language model has not.
    tokenizers = (*reversed(merged.base.companions), base_view.folder)
    find_tokenizer(tokenizers)  # a link out of a folder is found before anything is written
    return _write(
        FolderWriter(expand_home(out), specs, form=form, shard_size=shard_size, plan=plan),
        lambda name: merged.blocks(name, dtypes[name]),
        (base_view, replace(target_view, config=flat)),
        sign=-1,
        tokenizers=tokenizers,
        prints=prints,
        describe=lambda staged: write_weights_card(
            staged,
            f"{portable_name(target)}, as a delta to {portable_name(base)}",
            {"base": base, "target": target},
            adapters=folders,
            delta=True,
        ),
        progress=progress,
    )


def apply_delta(
    base: str | Path,
    delta: str | Path,
    out: str | Path,
    *,
    form: WeightsFormat = "bin",
    shard_size: int = RELEASED_SHARD_SIZE,
    force: bool = False,
    progress: Progress | None = None,
) -> WeightsReport:
    """Write base + delta in the released layout; for LLaMA, bit-equal to the original's ``apply_delta``.

    Never holds more than a few blocks of a tensor. If it was killed or the disk was full, the same call resumes.

    Args:
        base: Folder of the language model that the delta was made from.
        delta: Folder of a delta, as released or of ours.
        out: Folder to create.
        form: ``"bin"``, as released, or ``"safetensors"``.
        shard_size: Maximum size of a file in bytes.
        force: Accept a base that the delta was not made from, and weights that do not look like a base and a delta.
        progress: Called after each tensor with the number of bytes written and the total.

    Raises:
        ConfigError: A folder is not of the expected kind, or ``out`` exists.
        WeightsError: The delta was made from another base; tensors do not fit each other, are damaged or not finite.
        InterruptedRunError: Ctrl-C.
        EnvironmentFaultError: The disk is full, or another process is writing the same folder.
    """
    base_view, delta_view = view_as_released(base), view_as_released(delta)
    check_outside(expand_home(out), base_view.folder, delta_view.folder)
    if not force:
        check_not_delta(base_view.table.get(_NORM), base_view.folder, base_view.config)
        _check_is_delta(delta_view)
    base_view = with_head_of(base_view, delta_view)
    check_matching_tensors(base_view, delta_view)
    if not force:
        check_delta_base(base_view, delta_view)
    prints = {
        "base": take_fingerprint(base_view.table, base_view.config),
        "delta": take_fingerprint(delta_view.table, delta_view.config),
    }
    specs = [
        TensorSpec(name, entry.shape, delta_dtype(entry.dtype, delta_view.config))
        for name, entry in delta_view.table.items()
    ]
    tokenizers = (delta_view.folder, base_view.folder)
    find_tokenizer(tokenizers)  # a link out of a folder is found before anything is written
    return _write(
        FolderWriter(
            expand_home(out), specs, form=form, shard_size=shard_size, plan="apply" + _identity(base_view, delta_view)
        ),
        lambda name: read_blocks(delta_view.table[name]),
        (base_view, delta_view),
        sign=1,
        tokenizers=tokenizers,
        prints=prints,
        describe=lambda staged: write_weights_card(
            staged, f"{portable_name(base)} with {portable_name(delta)}", {"base": base, "delta": delta}
        ),
        progress=progress,
    )


def _check_is_delta(view: ReleasedView) -> None:
    norm = view.table.get(_NORM)
    if norm is not None and not is_delta(norm, view.folder, view.config):
        raise ConfigError.at(
            str(view.folder),
            "complete weights, expected a delta (the mean of a delta's last norm is near 0)",
            "give the folder of a delta; complete weights need no `delta apply`",
        )


def _check_roles(base: ReleasedView, target: ReleasedView, *, adapters: bool) -> None:
    """Reject folders that cannot be the base and the target of a delta."""
    for view in (base, target):
        check_not_delta(view.table.get(_NORM), view.folder, view.config)
    if not adapters and base.folder.resolve() == target.folder.resolve():
        raise ConfigError.at(
            str(target.folder), "the target is the base", "give the folder of the trained model as the target"
        )
    if not adapters and not any(name.startswith(tensor_names.RELEASED_PROJECTOR) for name in target.table):
        raise ConfigError.at(
            str(target.folder),
            "a plain language model, expected a LLaVAR (it has no projector)",
            "give the folder of the trained model as the target, or the adapter that was trained on it with --adapter",
        )


def _dtype(base: MergeBase, flat: Mapping[str, Any], name: str) -> str:
    """Return the dtype of a tensor of a delta to be made; that of the embeddings for one that is not on disk."""
    return delta_dtype(base.dtype(name), flat)


def delta_dtype(stored: str, config: Mapping[str, Any]) -> str:
    """Return the dtype of a delta's tensor, and of what is computed from it.

    Args:
        stored: Dtype of the target's tensor.
        config: The target's flat configuration. Deltas of LLaMA are in fp16, as released; the values of other models
            that were trained in bf16 may be outside of its range.
    """
    return stored if stored == "bfloat16" and not is_released_format(config) else "float16"


def _write(
    writer: FolderWriter,
    blocks: Callable[[str], Iterator[Tensor]],
    views: tuple[ReleasedView, ReleasedView],
    *,
    sign: int,
    tokenizers: Sequence[Path],
    prints: Mapping[str, Any],
    describe: Callable[[Path], None],
    progress: Progress | None,
) -> WeightsReport:
    """Write the blocks of a target or delta, combined with the base, which is the first of the views."""
    base = views[0].table

    def combined(spec: TensorSpec) -> Iterator[Tensor]:
        rows = read_blocks(base[spec.name]) if spec.name in base else iter(())
        return combine(blocks(spec.name), rows, sign=sign, dtype=spec.dtype)

    def finish(staged: Path) -> None:
        dtypes = {spec.dtype for spec in writer.specs.values()}
        copy_companions(views[1], staged, tokenizers, "bfloat16" if "bfloat16" in dtypes else "float16")
        write_text(staged / FINGERPRINT_FILE, json.dumps(prints) + "\n")
        describe(staged)

    return write_weights(
        writer,
        combined,
        sources=lambda name: [view.table.get(name) for view in views],
        finish=finish,
        progress=progress,
    )


def combine(blocks: Iterator[Tensor], base: Iterator[Tensor], *, sign: int, dtype: str) -> Iterator[Tensor]:
    """Add or subtract the base's rows, in the delta's dtype; rows that the base does not have are not changed.

    Args:
        blocks: Blocks of a target or delta.
        base: Blocks of the base's tensor of the same name; empty if there is none.
        sign: 1 adds, -1 subtracts.
        dtype: ``"float16"`` or ``"bfloat16"``.

    Yields:
        Blocks in this dtype.
    """
    half = torch_dtype(dtype)
    for block in blocks:
        result = block.to(half)
        rows = next(base, None)
        if rows is not None:
            shared_rows = result[: len(rows)]
            if sign > 0:
                shared_rows.add_(rows.to(half))
            else:
                shared_rows.sub_(rows.to(half))
        yield result
    for _ in base:  # the checksum is compared after the last block
        raise AssertionError("the base has more rows")


def _identity(*views: ReleasedView) -> str:
    return repr(identify_files(entry.path for view in views for entry in view.table.values()))
