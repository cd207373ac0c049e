"""The released delta format: what LLaVAR's weights are published as, made, applied and verified without a model.

Source: LLaVAR, llava/model/make_delta.py and llava/model/apply_delta.py. In fp16, tensor by tensor:
delta = target - base and target = base + delta; rows of ``embed_tokens`` and ``lm_head`` that the base does not have,
and the projector, are the target's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.weights.adapter.lora_updates import read_adapter
from llavar_peft.weights.base_check import FINGERPRINT_FILE, check_adapter_base, check_base, check_pair
from llavar_peft.weights.delta.released_layout import ReleasedView, copy_companions, view_as_released
from llavar_peft.weights.io.folder_writer import FolderWriter, WeightsReport
from llavar_peft.weights.io.shard_layout import RELEASED_SHARD_SIZE, TensorSpec, WeightsFormat
from llavar_peft.weights.io.stream_tensors import Blocks, Progress, stream
from llavar_peft.weights.io.tensor_blocks import count_not_finite, locate_fault, read_blocks
from llavar_peft.weights.merge.merge_base import released_merge_base
from llavar_peft.weights.merge.merge_plan import Onto, choose_rounding
from llavar_peft.weights.merge.merge_stream import MergedTensors
from llavar_peft.weights.weights_fingerprint import take_fingerprint

if TYPE_CHECKING:
    from torch import Tensor


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
    """Write target - base in the released format, bit-equal to the original's ``make_delta``.

    Never holds more than a few blocks of a tensor. Killed or out of disk, the same call goes on where it was.

    Args:
        base: Folder of a LLaMA or a Vicuna.
        target: Folder of a LLaVAR: a checkpoint of ours, or one in the released layout.
        out: Folder to make; must not exist.
        adapter: One adapter's folder, or several, merged into the target on the way, one after another: the delta is
            that of the merged model in fp16, which is never written itself. With one, the target may be the plain
            language model that it was trained on.
        onto: For adapters of a quantized base, as ``merge_adapter`` takes it.
        form: ``"bin"``, as released, or ``"safetensors"``.
        shard_size: Bytes of a file at most.
        progress: Told after each tensor how many bytes are written, and of how many.

    Returns:
        What was written.

    Raises:
        ConfigError: A folder that is not what it should be, or ``out`` exists.
        WeightsError: Tensors that do not fit each other, damaged or not finite.
        InterruptedRunError: Ctrl-C.
        EnvironmentFaultError: The disk is full, or another process writes the same folder.
    """
    old, new = view_as_released(base), view_as_released(target)
    check_pair(old, new)
    folders = [Path(adapter)] if isinstance(adapter, (str, Path)) else [Path(one) for one in adapter]
    for folder in folders[:1]:
        check_adapter_base(folder, lambda: take_fingerprint(new.table, new.config), str(target))
    adapters = [read_adapter(folder) for folder in folders]
    _, rounding = choose_rounding(folders, onto)
    merged = MergedTensors(released_merge_base(new, adapters), adapters, rounding=rounding)
    new = replace(new, config=dict(merged.base.config))
    specs = [TensorSpec(name, shape, "float16") for name, shape in merged.base.shapes.items()]

    def blocks(name: str) -> Iterator[Tensor]:
        return combined(merged.blocks(name, "float16"), _blocks_of(old, name), sign=-1)

    prints = {"base": take_fingerprint(old.table, old.config)}
    if not folders:  # what a merge comes to is not known before it is made
        prints["target"] = take_fingerprint(new.table, new.config)
    plan = repr((merged.identity(), rounding, _identity(old, new)))
    writer = FolderWriter(Path(out), specs, form=form, shard_size=shard_size, plan=plan)
    tensors = {spec.name: partial(blocks, spec.name) for spec in specs}
    # An adapter's tokenizer has the image tokens, its plain language model's has not.
    tokenizers = (*reversed(merged.base.companions), old.folder)
    return _write(writer, tensors, (old, new), tokenizers, prints, progress)


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
    """Write base + delta in the released layout, bit-equal to the original's ``apply_delta``.

    Never holds more than a few blocks of a tensor. Killed or out of disk, the same call goes on where it was.

    Args:
        base: Folder of the LLaMA or Vicuna that the delta was taken from.
        delta: Folder of a delta, as released or of ours.
        out: Folder to make; must not exist.
        form: ``"bin"``, as released, or ``"safetensors"``.
        shard_size: Bytes of a file at most.
        force: Go on with a base that the delta was not taken from.
        progress: Told after each tensor how many bytes are written, and of how many.

    Returns:
        What was written.

    Raises:
        ConfigError: A folder that is not what it should be, or ``out`` exists.
        WeightsError: Another base than the delta's; tensors that do not fit each other, damaged or not finite.
        InterruptedRunError: Ctrl-C.
        EnvironmentFaultError: The disk is full, or another process writes the same folder.
    """
    old, step = view_as_released(base), view_as_released(delta)
    check_pair(old, step)
    if not force:
        check_base(old, step)

    def blocks(name: str) -> Iterator[Tensor]:
        whole = read_blocks(step.table[name])
        return combined(whole, _blocks_of(old, name), sign=1)

    prints = {"base": take_fingerprint(old.table, old.config), "delta": take_fingerprint(step.table, step.config)}
    specs = [TensorSpec(name, entry.shape, "float16") for name, entry in step.table.items()]
    plan = "apply" + _identity(old, step)
    writer = FolderWriter(Path(out), specs, form=form, shard_size=shard_size, plan=plan)
    tensors = {spec.name: partial(blocks, spec.name) for spec in specs}
    return _write(writer, tensors, (old, step), (step.folder, old.folder), prints, progress)


def _blocks_of(view: ReleasedView, name: str) -> Iterator[Tensor]:
    return read_blocks(view.table[name]) if name in view.table else iter(())


def combined(whole: Iterator[Tensor], base: Iterator[Tensor], *, sign: int) -> Iterator[Tensor]:
    """Add or takes away the base's rows, in fp16; the rows after its last stay as they are.

    Args:
        whole: Blocks of a target or delta.
        base: Blocks of the base's tensor of the same name, none where it has none.
        sign: 1 adds, -1 takes away.

    Yields:
        Blocks in fp16.
    """
    for block in whole:
        result = block.half()
        rows = next(base, None)
        if rows is not None:
            known = result[: len(rows)]
            known.add_(rows.half()) if sign > 0 else known.sub_(rows.half())
        yield result
    for _ in base:  # its checksum is looked at after the last block
        raise AssertionError("the base has more rows")


def _write(
    writer: FolderWriter,
    tensors: Mapping[str, Blocks],
    sources: tuple[ReleasedView, ReleasedView],
    tokenizers: Sequence[Path],
    prints: Mapping[str, Any],
    progress: Progress | None,
) -> WeightsReport:
    def checked(name: str) -> Iterator[Tensor]:
        for block in tensors[name]():
            if count_not_finite(block):
                raise locate_fault(name, *(view.table.get(name) for view in sources))
            yield block

    stream(writer, {name: partial(checked, name) for name in tensors}, progress)
    staged = writer.finish()
    copy_companions(sources[1], staged, tokenizers)
    (staged / FINGERPRINT_FILE).write_text(json.dumps(prints) + "\n", encoding="utf-8")
    return writer.settle()


def _identity(*views: ReleasedView) -> str:
    files = sorted({entry.path.resolve() for view in views for entry in view.table.values()})
    return repr([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files])
