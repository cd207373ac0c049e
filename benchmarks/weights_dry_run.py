"""A delta of LLaVAR-13B's real size applied to sparse files: what memory it takes, on paper and measured.

    python weights_dry_run.py FOLDER TINY SIZE

Base and delta are files of 26 GB each that hold nothing but holes: they are read as zeros, checksums and all. So that
the result takes no disk either, zeros are skipped over where they would be written. That is the one change to the code
that is measured. A tiny delta is applied before, so that all that is imported on the way is there.
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
from llavar_peft.weights.io import folder_writer, stream_tensors
from llavar_peft.weights.io.shard_layout import TensorSpec, allocate_shards, finish_shards, index_of, plan_shards
from llavar_peft.weights.io.tensor_blocks import rows_per_block

HALF = 2
"""Bytes of a number in fp16."""


def write_sparse(folder: Path, shape: inputs.Shape, *, llavar: bool) -> int:
    """Write a model of zeros in the released layout, in holes.

    Returns:
        Bytes of its tensors.
    """
    shapes = inputs.tensor_shapes(shape, llavar=llavar)
    specs = [TensorSpec(name, sizes, inputs.dtype_of(name)) for name, sizes in shapes.items()]
    shards = plan_shards(specs, "bin")
    folder.mkdir()
    for file, shard in shards.items():
        allocate_shards(folder / file, shard)
        finish_shards(folder / file, {spec.name: _checksum_of_zeros(spec.nbytes) for spec in shard})
    index = index_of(shards, "bin")
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
    """In the place of the writer's last step: goes on by as much as would be written."""
    if torch.count_nonzero(torch.frombuffer(view, dtype=torch.uint8)):
        raise SystemExit("a number other than zero came of zeros")
    file.seek(len(view), os.SEEK_CUR)


def on_paper(shape: inputs.Shape, sizes: Mapping[str, int]) -> dict[str, int]:
    """Memory by arithmetic, in bytes, over what importing takes."""
    tables = [sizes for sizes in inputs.tensor_shapes(shape, llavar=True).values() if len(sizes) == 2]
    block = max(min(rows, rows_per_block((rows, columns))) * columns for rows, columns in tables) * HALF
    largest = max(rows * columns for rows, columns in tables) * HALF
    workers = stream_tensors._WORKERS
    return {
        "in_memory": sum(sizes.values()),
        "limit": 1_500_000_000 + 2 * largest,
        "workers": workers,
        "block": block,
        # One of the base and one of the delta, which becomes the result; the last ones still are while the next come.
        "ours": workers * 4 * block,
    }


def dry_run(folder: Path, tiny: Path, shape: inputs.Shape) -> dict[str, Any]:
    """Write the files and applies the delta.

    Args:
        folder: For the files, which are removed again.
        tiny: What ``write_inputs`` made.
        shape: Of the model.

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
        report = apply_delta(folder / "zeros-base", folder / "zeros-delta", outs[1])
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
        "paper": on_paper(shape, sizes),
    }


def _write_elsewhere(folder: Path, shape: inputs.Shape, *, llavar: bool) -> int:
    """``write_sparse`` in a process of its own, so that what laying out takes is not counted."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(write_sparse, folder, shape, llavar=llavar).result()


if __name__ == "__main__":
    found = dry_run(Path(sys.argv[1]), Path(sys.argv[2]), inputs.SHAPES[sys.argv[3]])
    sys.stdout.write(json.dumps(found) + "\n")
