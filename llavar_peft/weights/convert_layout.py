"""A model's weights under other names, in other files or another dtype, from disk to disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llavar_peft.errors import Fault, WeightsError
from llavar_peft.weights.io.folder_writer import FolderWriter, WeightsReport
from llavar_peft.weights.io.shard_layout import TensorSpec, WeightsFormat
from llavar_peft.weights.io.stream_tensors import Progress, stream
from llavar_peft.weights.io.tensor_blocks import (
    count_not_finite,
    first_not_finite,
    locate_fault,
    read_blocks,
    tensor_bytes,
)
from llavar_peft.weights.io.tensor_table import TensorEntry, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


def write_converted(
    tensors: Mapping[str, TensorEntry | Tensor],
    out: Path,
    *,
    dtype: str | None,
    form: WeightsFormat,
    shard_size: int,
    finish: Callable[[Path], None],
    progress: Progress | None,
) -> WeightsReport:
    """Write tensors to a new folder; no more than a few blocks of those on disk are in memory.

    Args:
        tensors: By the names they are to have.
        out: Folder to make.
        dtype: Of the result, by torch's name; None keeps each tensor's own.
        form: Of the files.
        shard_size: Bytes of a file at most.
        finish: Adds what belongs beside the weights, before the folder gets its name.
        progress: Told after each tensor how many bytes are written, and of how many.

    Returns:
        What was written.

    Raises:
        WeightsError: A tensor is damaged, not finite, or too large for the dtype.
    """
    import zlib

    specs = [TensorSpec(name, tuple(one.shape), dtype or _dtype_of(one)) for name, one in tensors.items()]
    files = sorted({one.path.resolve() for one in tensors.values() if isinstance(one, TensorEntry)})
    made = [(name, zlib.crc32(tensor_bytes(one))) for name, one in tensors.items() if not isinstance(one, TensorEntry)]
    plan = repr([[(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files], made])
    writer = FolderWriter(out, specs, form=form, shard_size=shard_size, plan=plan)

    def blocks(spec: TensorSpec) -> Iterator[Tensor]:
        source = tensors[spec.name]
        for block in read_blocks(source) if isinstance(source, TensorEntry) else [source]:
            converted = block.to(torch_dtype(spec.dtype))
            if count_not_finite(converted):
                raise _blamed(spec.name, source)
            yield converted

    stream(writer, {spec.name: partial(blocks, spec) for spec in specs}, progress)
    staged = writer.finish()
    try:
        finish(staged)
    except BaseException:
        writer.discard()
        raise
    return writer.settle()


def _dtype_of(tensor: TensorEntry | Tensor) -> str:
    return tensor.dtype if isinstance(tensor, TensorEntry) else str(tensor.dtype).removeprefix("torch.")


def _blamed(name: str, source: TensorEntry | Tensor) -> WeightsError:
    if isinstance(source, TensorEntry):
        return locate_fault(name, source)
    fault = first_not_finite([source], name) or Fault(name, "comes out too large for fp16", "use a wider dtype")
    return WeightsError(str(fault), (fault,))
