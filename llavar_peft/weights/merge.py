"""Adapters merged into their base from disk to disk, block by block in fp32, without a model in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.constants import MODEL_TYPE
from llavar_peft.errors import ConfigError, Fault, WeightsError
from llavar_peft.weights import names
from llavar_peft.weights.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llavar_peft.weights.blocks import blame, count_not_finite, read_blocks
from llavar_peft.weights.fingerprint import take_fingerprint
from llavar_peft.weights.layout import RELEASED_SHARD_SIZE, TensorSpec, WeightsFormat
from llavar_peft.weights.pairing import check_adapter_base
from llavar_peft.weights.released import read_model_config, view_as_released
from llavar_peft.weights.store import BIN_INDEX, SAFE_INDEX
from llavar_peft.weights.stream import Progress, stream
from llavar_peft.weights.table import CHECKSUMS_FILE, TensorEntry, read_table, torch_dtype
from llavar_peft.weights.updates import Adapter, Update, read_adapter
from llavar_peft.weights.writer import FolderWriter, WeightsReport

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 6
_COMPANIONS = ("*.json", "*.model", "*.jinja", "*.txt")


def merge_adapter(  # noqa: PLR0913 - each is a choice of the caller's
    base: str | Path,
    adapter: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    dtype: str | None = None,
    form: WeightsFormat = "safetensors",
    shard_size: int = RELEASED_SHARD_SIZE,
    force: bool = False,
    progress: Progress | None = None,
) -> WeightsReport:
    """Writes a base with adapters merged into it, in the base's own layout.

    Computed in fp32 and rounded once; no more than a few blocks of a tensor are in memory. Killed or out of disk, the
    same call goes on where it was.

    Args:
        base: Folder of what the adapters were trained on: a checkpoint of ours, or one in the released layout.
        adapter: One adapter's folder or several.
        out: Folder to make; must not exist.
        weights: None merges several one after another, each into the result of those before it (what was trained in
            full is then the last one's). Otherwise one factor for each: base + sum of factor * (merged alone - base).
        dtype: Of the result, by torch's name; None keeps each tensor's own.
        form: ``"safetensors"``, or ``"bin"`` as LLaVAR was released.
        shard_size: Bytes of a file at most.
        force: Go on with a base of the right shape that the adapters were not trained on.
        progress: Told after each tensor how many bytes are written, and of how many.

    Returns:
        What was written.

    Raises:
        ConfigError: A folder that is not what it should be, or ``out`` exists.
        WeightsError: An adapter of another base; tensors that do not fit, damaged or not finite.
        InterruptedRunError: Ctrl-C.
        EnvironmentFaultError: The disk is full, or another process writes the same folder.
    """
    folder = Path(base)
    folders = [Path(adapter)] if isinstance(adapter, (str, Path)) else [Path(one) for one in adapter]
    # One after another, the second may have been trained on what the first made of the base.
    for one in () if force else folders if weights is not None else folders[:1]:
        check_adapter_base(one, lambda: _fingerprint(folder), str(folder))
    config = read_model_config(folder)
    ours = _same if config.get("model_type") == MODEL_TYPE else names.from_released
    table = {name: entry for name, entry in read_table(folder).items() if ours(name) is not None}
    merged = MergedTensors(table, ours, [read_adapter(one) for one in folders], weights)
    specs = [TensorSpec(name, entry.shape, dtype or entry.dtype) for name, entry in table.items()]
    plan = repr([merged.identity(), weights, dtype])
    writer = FolderWriter(Path(out), specs, form=form, shard_size=shard_size, plan=plan)

    def checked(spec: TensorSpec) -> Iterator[Tensor]:
        for block in merged.blocks(spec.name, spec.dtype):
            if count_not_finite(block):
                raise blame(spec.name, table[spec.name])
            yield block

    stream(writer, {spec.name: partial(checked, spec) for spec in specs}, progress)
    staged = writer.finish()
    _copy_companions(folder, staged, dtype)
    return writer.settle()


class MergedTensors:
    """The tensors of a base as adapters change them.

    Args:
        table: The base's, by any names.
        ours: Our name of one of those.
        adapters: In their order.
        weights: As ``merge_adapter`` takes them.

    Raises:
        ConfigError: Not one weight for each adapter.
        WeightsError: An update that does not land on a tensor of the base, or does not fit it.
    """

    def __init__(
        self,
        table: Mapping[str, TensorEntry],
        ours: Callable[[str], str | None],
        adapters: Sequence[Adapter],
        weights: Sequence[float] | None = None,
    ) -> None:
        if weights is not None and len(weights) != len(adapters):
            what = f"not one for each adapter (got {len(weights)}, wanted {len(adapters)})"
            raise ConfigError.at("weights", what, "give as many weights as adapters")
        self._table, self._ours, self._adapters, self._weights = table, ours, adapters, weights
        check_landing(adapters, {ours(name): entry for name, entry in table.items()})

    def blocks(self, name: str, dtype: str) -> Iterator[Tensor]:
        """A tensor after the merge.

        Args:
            name: As in the table.
            dtype: Of the result.

        Yields:
            Blocks of its rows, from first to last.
        """
        entry, key = self._table[name], self._ours(name) or ""
        updates = [(number, one.updates[key]) for number, one in enumerate(self._adapters) if key in one.updates]
        start = 0
        for block in read_blocks(entry):
            rows = self._merged(block.float(), updates, start) if updates else block
            start += len(block)
            yield rows.to(torch_dtype(dtype))

    def _merged(self, rows: Tensor, updates: Sequence[tuple[int, Update]], start: int) -> Tensor:
        if self._weights is None:
            for _, update in updates:
                rows = update.applied(rows, start)
            return rows
        total = rows.clone()
        for number, update in updates:
            total += self._weights[number] * (update.applied(rows, start) - rows)
        return total

    def identity(self) -> list[tuple[str, int, int]]:
        """Path, size and time of every file that the result depends on."""
        files = {entry.path.resolve() for entry in self._table.values()}
        for adapter in self._adapters:
            files |= {(adapter.folder / name).resolve() for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG)}
        return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]


def check_landing(adapters: Sequence[Adapter], table: Mapping[str | None, TensorEntry]) -> None:
    """Refuses adapters that were not trained on a base of this shape.

    Args:
        adapters: To be merged.
        table: The base's tensors by our names.

    Raises:
        WeightsError: Names every update that has no tensor of the base to land on, or does not fit it.
    """
    faults = []
    for adapter in adapters:
        where = str(adapter.folder)
        lost = [name for name in adapter.updates if name not in table]
        bad = [
            f"{name} (the base's is {list(table[name].shape)})"
            for name, update in adapter.updates.items()
            if name in table and not update.fits(table[name].shape)
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


def _same(name: str) -> str:
    return name


def _copy_companions(folder: Path, staged: Path, dtype: str | None) -> None:
    weights = {BIN_INDEX, SAFE_INDEX, CHECKSUMS_FILE}
    for pattern in _COMPANIONS:
        for path in sorted(folder.glob(pattern)):
            if path.name not in weights:
                shutil.copyfile(path, staged / path.name)
    if dtype is not None:
        path = staged / "config.json"
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
