"""How tensors are divided among files, and the empty files that tensors are then written into in any order.

A sparse file with space for every tensor is created at once; the layout of a ``.bin`` is that of ``torch.save``.
"""

from __future__ import annotations

import json
import math
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llavar_peft.weights.io.tensor_table import (
    BIN_INDEX,
    BIN_SINGLE,
    SAFE_INDEX,
    SAFE_NAMES,
    SAFE_SINGLE,
    read_file_table,
    torch_dtype,
)

WeightsFormat = Literal["bin", "safetensors"]
"""``bin`` is the released format: ``torch.save`` of a state dict."""

RELEASED_SHARD_SIZE = 10_000_000_000
"""Maximum size of a file in bytes, unless one tensor is larger. Source: transformers 4.28, ``save_pretrained``."""

# Fields of the zip format.
_DESCRIPTOR = b"PK\x07\x08"
_CENTRAL_CRC = 16
_CENTRAL_FIXED = 46


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written.

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
        form: Format of the files.
        shard_size: Maximum size of a file in bytes, unless one tensor is larger.

    Returns:
        The tensors of each file, by file name.

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


def build_index(shards: Mapping[str, Sequence[TensorSpec]], form: WeightsFormat) -> tuple[str, str] | None:
    """Return the file name and the text of the index; None for a single file."""
    if len(shards) == 1:
        return None
    total = sum(spec.nbytes for shard in shards.values() for spec in shard)
    files = {spec.name: file for file, shard in shards.items() for spec in shard}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2, sort_keys=True) + "\n"
    return (BIN_INDEX if form == "bin" else SAFE_INDEX), text


def allocate_file(path: Path, specs: Sequence[TensorSpec]) -> None:
    """Create a ``.bin`` or ``.safetensors`` file with space for tensors, whose values are undefined."""
    if path.suffix == ".safetensors":
        _allocate_safetensors(path, specs)
    else:
        _allocate_bin(path, specs)


def _allocate_safetensors(path: Path, specs: Sequence[TensorSpec]) -> None:
    # Old readers of safetensors require the metadata.
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


def _allocate_bin(path: Path, specs: Sequence[TensorSpec]) -> None:
    import torch
    from torch.serialization import skip_data

    # Address space only: the operating system provides no memory for pages that are neither read nor written.
    tensors = {}
    for spec in specs:
        storage: Any = torch.UntypedStorage
        empty: Any = torch.empty(0, dtype=torch_dtype(spec.dtype))
        tensors[spec.name] = empty.set_(storage(spec.nbytes), 0, spec.shape)
    with skip_data():
        torch.save(tensors, path)


def write_zip_checksums(path: Path, checksums: Mapping[str, int]) -> None:
    """Write checksums into a ``.bin`` whose tensors are complete; do nothing for other files.

    Args:
        path: The file.
        checksums: CRC-32 by tensor.
    """
    if path.suffix == ".safetensors":
        return
    by_offset = {entry.offset: checksums[name] for name, entry in read_file_table(path).items()}
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
