"""How tensors are divided among shards, and the shards before any tensor is in them.

A file of weights is laid out at once, sparse, with room for every tensor; the tensors' bytes are then put into their
places in any order. For ``.bin`` the layout is ``torch.save``'s own, told to leave the data out.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llavar_peft.weights.io.open_weights import BIN_INDEX, BIN_SINGLE, SAFE_INDEX, SAFE_SINGLE
from llavar_peft.weights.io.tensor_table import SAFE_NAMES, TensorEntry, read_file_tensor_table, torch_dtype

WeightsFormat = Literal["bin", "safetensors"]
"""``bin`` is the released one: ``torch.save`` of a table of tensors."""

RELEASED_SHARD_SIZE = 10_000_000_000
"""Bytes of a shard at most, unless one tensor is larger. Source: transformers 4.28, ``save_pretrained``."""

_DESCRIPTOR = b"PK\x07\x08"
_CENTRAL_CRC = 16
_CENTRAL_FIXED = 46


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that is to be written.

    Attributes:
        name: Its name in the file.
        shape: Its shape.
        dtype: Torch's name of its dtype, e.g. ``"float16"``.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return math.prod(self.shape) * torch_dtype(self.dtype).itemsize


def plan_shards(
    specs: Sequence[TensorSpec], form: WeightsFormat, shard_size: int = RELEASED_SHARD_SIZE
) -> dict[str, list[TensorSpec]]:
    """Divide tensors among files, in their order, as ``save_pretrained`` does.

    Args:
        specs: The tensors.
        form: Of the files.
        shard_size: Bytes of a file at most, unless one tensor is larger.

    Returns:
        Tensors by the name of their file.

    Source: transformers 4.28, modeling_utils.py, ``shard_checkpoint``.
    """
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    single = BIN_SINGLE if form == "bin" else SAFE_SINGLE
    if len(shards) == 1:
        return {single: shards[0]}
    stem, ending = single.rsplit(".", 1)
    return {f"{stem}-{n:05d}-of-{len(shards):05d}.{ending}": shard for n, shard in enumerate(shards, 1)}


def index_of(shards: Mapping[str, Sequence[TensorSpec]], form: WeightsFormat) -> tuple[str, str] | None:
    """Name and text of the index; None where there is one file only."""
    if len(shards) == 1:
        return None
    total = sum(spec.nbytes for shard in shards.values() for spec in shard)
    where = {spec.name: file for file, shard in shards.items() for spec in shard}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, sort_keys=True) + "\n"
    return (BIN_INDEX if form == "bin" else SAFE_INDEX), text


def allocate_shards(path: Path, specs: Sequence[TensorSpec]) -> None:
    """Make a file with room for the tensors; what is in the room is undefined.

    Args:
        path: Ends in ``.bin`` or ``.safetensors``.
        specs: In the order of the file.
    """
    if path.suffix == ".safetensors":
        _lay_out_safetensors(path, specs)
    else:
        _lay_out_bin(path, specs)


def tensor_offsets(path: Path) -> dict[str, TensorEntry]:
    """Where a laid out file has room for each tensor."""
    return read_file_tensor_table(path)


def _lay_out_safetensors(path: Path, specs: Sequence[TensorSpec]) -> None:
    # Old readers of safetensors want the metadata.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        fields = {"dtype": SAFE_NAMES[spec.dtype], "shape": list(spec.shape)}
        header[spec.name] = {**fields, "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def _lay_out_bin(path: Path, specs: Sequence[TensorSpec]) -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.serialization import skip_data

    with FakeTensorMode():
        tensors = {spec.name: torch.empty(spec.shape, dtype=torch_dtype(spec.dtype)) for spec in specs}
    with skip_data(materialize_fake_tensors=True):
        torch.save(tensors, path)


def finish_shards(path: Path, checksums: Mapping[str, int]) -> None:
    """Enters the checksums of the tensors into a file that is filled; safetensors has no place for them.

    Args:
        path: The file.
        checksums: CRC-32 by tensor.
    """
    if path.suffix == ".safetensors":
        return
    by_offset = {entry.offset: checksums[name] for name, entry in tensor_offsets(path).items()}
    with zipfile.ZipFile(path) as archive:
        infos, directory = archive.infolist(), archive.start_dir
    with path.open("r+b") as file:
        for info in infos:
            file.seek(info.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            start = info.header_offset + 30 + name + extra
            file.seek(directory)
            fixed = file.read(_CENTRAL_FIXED)
            if start in by_offset:
                crc = struct.pack("<I", by_offset[start])
                file.seek(directory + _CENTRAL_CRC)
                file.write(crc)
                file.seek(start + info.file_size)
                if file.read(4) == _DESCRIPTOR:
                    file.seek(start + info.file_size + 4)
                    file.write(crc)
            directory += _CENTRAL_FIXED + sum(struct.unpack("<HHH", fixed[28:34]))
