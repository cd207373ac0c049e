"""Checksums beside weights in safetensors, which has none of its own: later damage is seen by whoever streams them."""

from __future__ import annotations

import zlib
from pathlib import Path

from llavar_peft.atomic_files import write_json
from llavar_peft.weights.io.tensor_blocks import read_blocks, tensor_bytes
from llavar_peft.weights.io.tensor_table import CHECKSUMS_FILE, read_file_tensor_table


def write_checksums(folder: Path) -> None:
    """Take the CRC-32 of each tensor of a folder that was just written.

    Args:
        folder: With safetensors files, whose tensors' names differ.
    """
    (folder / CHECKSUMS_FILE).unlink(missing_ok=True)
    sums: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in read_file_tensor_table(path).items():
            sums[name] = 0
            for block in read_blocks(entry):
                sums[name] = zlib.crc32(tensor_bytes(block), sums[name])
    write_json(folder / CHECKSUMS_FILE, sums)
