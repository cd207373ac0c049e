"""Weights as files: tensors of a folder read lazily, whatever layout its shards have.

Nothing here builds a model. Safetensors are memory-mapped; old ``.bin`` shards are read with ``weights_only=True`` and
mapped where their format allows it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

SAFE_SINGLE = "model.safetensors"
SAFE_INDEX = "model.safetensors.index.json"
BIN_SINGLE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"


class WeightsStore(Mapping[str, "Tensor"]):
    """The tensors of one folder (or one file), by name.

    A shard is opened when its first tensor is asked for.
    """

    def __init__(self, source: Path, where: Mapping[str, Path]) -> None:
        self.source = source
        self._where = dict(where)
        self._open: dict[Path, Mapping[str, Tensor]] = {}

    def __getitem__(self, name: str) -> Tensor:
        path = self._where[name]
        if path not in self._open:
            self._open[path] = _open_file(path)
        try:
            return self._open[path][name]
        except KeyError:
            raise WeightsError.at(
                f"{path}:{name}",
                "the index names this tensor but the shard does not hold it",
                "fetch the shard and its index again",
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


class _SafetensorsFile(Mapping[str, "Tensor"]):
    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file: Any = safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise unreadable(path, error) from error
        opened: Any = self._file
        self._names: tuple[str, ...] = tuple(opened.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, slots=True)
class Shards:
    """The files that hold a model's weights.

    Attributes:
        files: In the order of the index.
        names: File by tensor, as the index says; empty where there is no index.
    """

    files: tuple[Path, ...]
    names: Mapping[str, Path]


def find_shards(source: str | Path) -> Shards:
    """Find the weights of a folder, or of a single ``.safetensors`` or ``.bin`` file.

    Args:
        source: Folder with ``model.safetensors``, ``pytorch_model.bin`` or an index of either; or one file.

    Returns:
        The files. Safetensors are preferred.

    Raises:
        WeightsError: Nothing there, or a shard of the index is missing.
    """
    path = Path(source)
    if path.is_file():
        return Shards((path,), {})
    for index in (SAFE_INDEX, BIN_INDEX):
        if (path / index).is_file():
            where = _read_index(path / index)
            return Shards(tuple(sorted(set(where.values()))), where)
    for single in (SAFE_SINGLE, BIN_SINGLE):
        if (path / single).is_file():
            return Shards((path / single,), {})
    raise WeightsError.at(
        str(path),
        f"no weights (got {_listing(path)}; wanted {SAFE_SINGLE}, {BIN_SINGLE} or an index of either)",
        "give the folder that holds the model's shards",
    )


def open_weights(source: str | Path) -> WeightsStore:
    """Open a folder of shards, or a single ``.safetensors`` or ``.bin`` file.

    Args:
        source: Folder with ``model.safetensors``, ``pytorch_model.bin`` or an index of either; or one file.

    Returns:
        The tensors by name, lazily.

    Raises:
        WeightsError: Nothing there, a shard of the index missing, or a file that cannot be read.
    """
    shards = find_shards(source)
    if shards.names:
        return WeightsStore(Path(source), shards.names)
    return WeightsStore(Path(source), {name: path for path in shards.files for name in _open_file(path)})


def _read_index(index: Path) -> dict[str, Path]:
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        where = {str(name): index.parent / str(file) for name, file in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError.at(str(index), f"not an index of shards ({error})", "fetch the index again") from error
    missing = sorted({file.name for file in where.values() if not file.is_file()})
    if missing:
        raise WeightsError.at(
            str(index), f"shards missing from the folder: {', '.join(missing)}", "fetch the missing shards"
        )
    return where


def _open_file(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        return _SafetensorsFile(path)
    return _open_bin(path)


def _open_bin(path: Path) -> Mapping[str, Tensor]:
    import zipfile

    import torch

    try:
        # Files older than torch 1.6 are no zip archives and cannot be mapped.
        tensors = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:  # torch lets through whatever the bytes provoke
        raise unreadable(path, error) from error
    if not isinstance(tensors, Mapping) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise WeightsError.at(
            str(path), f"holds a {type(tensors).__name__}, expected a table of tensors", "give a file of weights"
        )
    return tensors


def unreadable(path: Path, error: Exception) -> WeightsError:
    """The error for a file that its library cannot open, with the library's reason."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    fault = WeightsError.at(str(path), f"cannot be read as weights ({reason})", "fetch the file again")
    return WeightsError(str(fault), fault.faults)


def _listing(path: Path) -> str:
    if not path.is_dir():
        return "no such folder"
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "an empty folder"
