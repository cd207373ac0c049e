"""The released delta format: what LLaVAR's weights are published as, made, applied and verified without a model.

Source: LLaVAR, llava/model/make_delta.py and llava/model/apply_delta.py. In fp16, tensor by tensor:
delta = target - base and target = base + delta; rows of ``embed_tokens`` and ``lm_head`` that the base does not have,
and the projector, are the target's own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.errors import ConfigError, Fault, WeightsError
from llavar_peft.weights import names
from llavar_peft.weights.blocks import count_not_finite, first_not_finite, read_blocks, where_of
from llavar_peft.weights.fingerprint import differences, read_fingerprint, take_fingerprint
from llavar_peft.weights.layout import RELEASED_SHARD_SIZE, TensorSpec, WeightsFormat
from llavar_peft.weights.lineage import Lineage, trace_lineage
from llavar_peft.weights.released import ReleasedView, copy_companions, view_as_released
from llavar_peft.weights.stream import Progress, stream
from llavar_peft.weights.table import TensorEntry
from llavar_peft.weights.writer import FolderWriter

if TYPE_CHECKING:
    from torch import Tensor

FINGERPRINT_FILE = "fingerprints.json"
"""Fingerprints: of ``base`` and ``target`` beside a delta, of ``base`` and ``delta`` beside what was made from one."""
_GROWS = (names.RELEASED_EMBEDDINGS, names.HEAD)
_VERBATIM = (names.RELEASED_PROJECTOR_WEIGHT, names.RELEASED_PROJECTOR_BIAS)
_SHOWN = 6


@dataclass(frozen=True, slots=True)
class WeightsReport:
    """What was written.

    Attributes:
        out: The folder.
        tensors: How many.
        nbytes: Bytes of their numbers.
        seconds: How long it took.
    """

    out: Path
    tensors: int
    nbytes: int
    seconds: float


def make_delta(
    base: str | Path,
    target: str | Path,
    out: str | Path,
    *,
    form: WeightsFormat = "bin",
    shard_size: int = RELEASED_SHARD_SIZE,
    progress: Progress | None = None,
) -> WeightsReport:
    """Writes target - base in the released format, bit-equal to the original's ``make_delta``.

    Never holds more than a few blocks of a tensor. Killed or out of disk, the same call goes on where it was.

    Args:
        base: Folder of a LLaMA or a Vicuna.
        target: Folder of a LLaVAR: a checkpoint of ours, or one in the released layout.
        out: Folder to make; must not exist.
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

    def blocks(name: str) -> Iterator[Tensor]:
        whole = read_blocks(new.table[name])
        return combined(whole, _blocks_of(old, name), sign=-1)

    prints = {"base": take_fingerprint(old.table, old.config), "target": take_fingerprint(new.table, new.config)}
    return _write(Path(out), old, new, blocks, prints, form, shard_size, progress)


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
    """Writes base + delta in the released layout, bit-equal to the original's ``apply_delta``.

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
    return _write(Path(out), old, step, blocks, prints, form, shard_size, progress)


def check_base(old: ReleasedView, step: ReleasedView) -> str:
    """Refuses a base that a delta was not taken from.

    Args:
        old: The base.
        step: The delta.

    Returns:
        How it was told: ``"fingerprint"``, or for a delta that has none ``"statistics"``, those of ``lineage``.

    Raises:
        WeightsError: It is another base; says what gave it away.
    """
    known = read_fingerprint(step.folder / FINGERPRINT_FILE)
    if known is not None and "base" in known:
        found = differences(known["base"], take_fingerprint(old.table, old.config))
        if found:
            raise _wrong_base(old, step, f"its fingerprint differs in {_some(found)}")
        return "fingerprint"
    lineage = trace_lineage(old.table, step.table)
    if not lineage.fits:
        raise _wrong_base(old, step, _evidence(lineage))
    return "statistics"


def _evidence(lineage: Lineage) -> str:
    share = lineage.off / lineage.tested
    where = f", most in {_some(list(lineage.tensors))}" if lineage.tensors else ""
    return f"{share:.2%} of {lineage.tested} sampled differences cannot have come from these numbers{where}"


def _wrong_base(old: ReleasedView, step: ReleasedView, why: str) -> WeightsError:
    fault = Fault(
        str(old.folder),
        f"not the base that {step.folder} was taken from: {why}",
        "give the original base (LLaVAR's is LLaMA-13B, not Vicuna), unchanged; or force it and get other weights",
    )
    return WeightsError(str(fault), (fault,))


def check_pair(old: ReleasedView, new: ReleasedView) -> None:
    """Refuses a base and a target (or delta) that do not have the same tensors, but for what LLaVA adds to LLaMA.

    Args:
        old: The base.
        new: The target or delta: may have the projector besides, and more rows of the embeddings and the head.

    Raises:
        WeightsError: Names what is missing, unknown or misshapen, on either side.

    Source: the assertions of LLaVAR, llava/model/make_delta.py and apply_delta.py.
    """
    mend = "give the base that the other was trained from"
    absent = [name for name in old.table if name not in new.table]
    unknown = [name for name in new.table if name not in old.table and name not in _VERBATIM]
    faults = [
        Fault(str(view.folder), f"{len(found)} tensors of {other.folder} are missing: {_some(found)}", mend)
        for view, other, found in ((new, old, absent), (old, new, unknown))
        if found
    ]
    for name, entry in new.table.items():
        if name in old.table and not _fits(name, old.table[name].shape, entry.shape):
            what = f"does not fit {new.folder} (got {list(old.table[name].shape)}, wanted {list(entry.shape)})"
            faults.append(Fault(f"{old.folder}:{name}", what, mend))
    if faults:
        shown = faults[:_SHOWN]
        more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise WeightsError("\n".join([*map(str, shown), *more]), faults)


def _fits(name: str, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    return old == new or (name in _GROWS and old[1:] == new[1:] and old[0] <= new[0])


def _blocks_of(view: ReleasedView, name: str) -> Iterator[Tensor]:
    return read_blocks(view.table[name]) if name in view.table else iter(())


def combined(whole: Iterator[Tensor], base: Iterator[Tensor], *, sign: int) -> Iterator[Tensor]:
    """Adds or takes away the base's rows, in fp16; the rows after its last stay as they are.

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
    out: Path,
    old: ReleasedView,
    new: ReleasedView,
    blocks: Any,
    prints: Mapping[str, Any],
    form: WeightsFormat,
    shard_size: int,
    progress: Progress | None,
) -> WeightsReport:
    started = time.perf_counter()
    if out.exists():
        raise ConfigError.at(str(out), "exists already", "remove it, or give another folder")
    specs = [TensorSpec(name, entry.shape, "float16") for name, entry in new.table.items()]
    writer = FolderWriter(out, specs, form=form, shard_size=shard_size, plan=_identity(old, new))

    def checked(name: str) -> Iterator[Tensor]:
        for block in blocks(name):
            if count_not_finite(block):
                raise blame(name, old.table.get(name), new.table[name])
            yield block

    stream(writer, {name: partial(checked, name) for name in new.table}, progress)
    staged = writer.finish()
    copy_companions(new, staged)
    (staged / FINGERPRINT_FILE).write_text(json.dumps(prints) + "\n", encoding="utf-8")
    writer.settle()
    return WeightsReport(out, len(specs), writer.total, time.perf_counter() - started)


def _identity(*views: ReleasedView) -> str:
    files = sorted({entry.path.resolve() for view in views for entry in view.table.values()})
    return repr([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files])


def blame(name: str, *entries: TensorEntry | None) -> WeightsError:
    """The error for a result that is not finite: which file holds such numbers, or that fp16 is too small.

    Args:
        name: The tensor.
        *entries: What it was made from.

    Returns:
        The error, to be raised.
    """
    for entry in entries:
        fault = first_not_finite(read_blocks(entry), where_of(entry)) if entry is not None else None
        if fault is not None:
            return WeightsError(str(fault), (fault,))
    where = " and ".join(where_of(entry) for entry in entries if entry is not None)
    fault = Fault(where, f"{name} comes out too large for fp16", "use weights that belong together")
    return WeightsError(str(fault), (fault,))


def _some(found: list[str]) -> str:
    return ", ".join(found[:_SHOWN]) + (f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
