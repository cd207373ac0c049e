"""Apply a delta of the size of LLaVAR-13B to sparse files: memory, calculated and measured.

    python weights_dry_run.py FOLDER TINY SIZE

Base and delta are sparse files of 26 GB each, which are read as zeros and have the checksums of zeros. Zeros are
skipped instead of written, so that the result needs no disk space either; this is the only change to the measured code.
A tiny delta is applied before, so that everything is imported.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import zlib
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import torch
import weights_inputs as inputs
from weights_contenders import counters

from llavar_peft import apply_delta
from llavar_peft.weights.io import folder_writer, write_weights
from llavar_peft.weights.io.shard_layout import TensorSpec, allocate_file, build_index, plan_shards, write_zip_checksums
from llavar_peft.weights.io.tensor_blocks import rows_per_block

HALF = 2
"""Bytes of an fp16 number."""


def write_sparse(folder: Path, shape: inputs.Shape, *, llavar: bool) -> int:
    """Write a model of zeros in the released layout, as sparse files.

    Returns:
        Bytes of its tensors.
    """
    shapes = inputs.tensor_shapes(shape, llavar=llavar)
    specs = [TensorSpec(name, sizes, inputs.dtype_of(name)) for name, sizes in shapes.items()]
    shards = plan_shards(specs, "bin")
    folder.mkdir()
    for file, shard in shards.items():
        allocate_file(folder / file, shard)
        write_zip_checksums(folder / file, {spec.name: _checksum_of_zeros(spec.nbytes) for spec in shard})
    index = build_index(shards, "bin")
    if index is not None:
        (folder / index[0]).write_text(index[1])
    (folder / "config.json").write_text(json.dumps(inputs.flat_config(shape, llavar=llavar)))
    return sum(spec.nbytes for spec in specs)


@cache
def _checksum_of_zeros(count: int) -> int:
    piece, checksum = bytes(1 << 20), 0
    for start in range(0, count, len(piece)):
        checksum = zlib.crc32(piece[: count - start], checksum)
    return checksum


def skip_zeros(file: IO[bytes], view: memoryview) -> None:
    """Skip zeros instead of writing them. Replaces the last step of the writer."""
    if torch.count_nonzero(torch.frombuffer(view, dtype=torch.uint8)):
        raise SystemExit("the result is not zero")
    file.seek(len(view), os.SEEK_CUR)


def calculate_memory(shape: inputs.Shape, sizes: Mapping[str, int]) -> dict[str, int]:
    """Calculate the memory in bytes, in addition to that of imports."""
    matrices = [sizes for sizes in inputs.tensor_shapes(shape, llavar=True).values() if len(sizes) == 2]
    block = max(min(rows, rows_per_block((rows, columns))) * columns for rows, columns in matrices) * HALF
    largest = max(rows * columns for rows, columns in matrices) * HALF
    workers = write_weights.WORKERS
    return {
        "in_memory": sum(sizes.values()),
        "limit": 1_500_000_000 + 2 * largest,
        "workers": workers,
        "block": block,
        # One of the base and one of the delta, which becomes the result; the previous ones exist while these are read.
        "ours": workers * 4 * block,
    }


def dry_run(folder: Path, tiny: Path, shape: inputs.Shape) -> dict[str, Any]:
    """Write the files and apply the delta.

    Args:
        folder: Folder for the files, which are deleted at the end.
        tiny: Folder written by ``write_inputs``.
        shape: Shape of the model.

    Returns:
        The figures; sizes in bytes, times in seconds.
    """
    sizes = {"base": _write_elsewhere(folder / "zeros-base", shape, llavar=False)}
    sizes["delta"] = _write_elsewhere(folder / "zeros-delta", shape, llavar=True)
    outs = [folder / name for name in ("zeros-rehearsal", "zeros-out")]
    apply_delta(tiny / "base", tiny / "delta", outs[0])
    before, write_all = counters(), folder_writer._write_all
    folder_writer._write_all = skip_zeros
    try:
        report = apply_delta(folder / "zeros-base", folder / "zeros-delta", outs[1], force=True)
    finally:
        folder_writer._write_all = write_all
    after = counters()
    made = [folder / "zeros-base", folder / "zeros-delta", outs[1]]
    disk = sum(path.stat().st_blocks * 512 for one in made for path in one.iterdir())
    for one in (*made, outs[0]):
        shutil.rmtree(one)
    return {
        **{key: after[key] - before[key] for key in ("clock", "cpu", "asked")},
        "peak": after["peak"],
        "over_imports": after["peak"] - before["resident"],
        "written": report.nbytes,
        "bytes": sizes,
        "disk": disk,
        "paper": calculate_memory(shape, sizes),
    }


def _write_elsewhere(folder: Path, shape: inputs.Shape, *, llavar: bool) -> int:
    """Run ``write_sparse`` in a separate process, so that its memory is not counted."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(write_sparse, folder, shape, llavar=llavar).result()


if __name__ == "__main__":
    found = dry_run(Path(sys.argv[1]), Path(sys.argv[2]), inputs.SHAPES[sys.argv[3]])
    sys.stdout.write(json.dumps(found) + "\n")
