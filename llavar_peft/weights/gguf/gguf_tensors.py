"""The tensors of a GGUF file: how each is computed from a tensor on disk, and the file written from them.

The library ``gguf`` writes the header; the tensors follow in its order, a block of rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from llavar_peft.errors import ConfigError, MissingDependencyError, WeightsError
from llavar_peft.weights.io.tensor_blocks import (
    count_not_finite,
    not_finite_error,
    read_blocks,
    read_tensor,
    rows_per_block,
    tensor_bytes,
)
from llavar_peft.weights.io.tensor_table import DOWNLOAD_AGAIN, TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

GgufType = Literal["F32", "F16", "BF16", "Q8_0"]
OutType = Literal["f16", "q8_0", "bf16"]
MATRIX_TYPES: Final[dict[OutType, GgufType]] = {"f16": "F16", "q8_0": "Q8_0", "bf16": "BF16"}
"""How each ``--outtype`` stores matrices. Vectors are always F32, which llama.cpp requires."""
OTHER_LAYOUT: Final = "use the layout hf-llava, or llavar with `llavar-peft serve`"
"""What to do with a model that llama.cpp does not have, for messages."""
_GROUP: Final = 32
"""Number of neighboring elements of a row that share a scale in Q8_0."""


def import_gguf() -> Any:
    """Return the library that writes GGUF files.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError.at(
            "gguf", f"the package gguf is not installed ({error})", "pip install 'llavar-peft[gguf]'"
        ) from error
    return gguf


def check_outtype(outtype: str | None, to: str, dtype: str | None) -> None:
    """Reject settings of the stored numbers that do not belong to a layout.

    Raises:
        ConfigError: ``outtype`` is unknown or given for another layout, or ``dtype`` for ``gguf``.
    """
    if outtype is not None and to != "gguf":
        raise ConfigError.at("outtype", f"applies only to the layout gguf (got {to})", "leave it out, or use dtype")
    if outtype not in (None, *MATRIX_TYPES):
        known = ", ".join(MATRIX_TYPES)
        raise ConfigError.at("outtype", f"unknown (got {outtype!r}, expected one of {known})", "correct it")
    if dtype is not None and to == "gguf":
        raise ConfigError.at("dtype", "does not apply to the layout gguf", "leave it out, or use outtype")


def describe_file(writer: Any, kind: Literal["MODEL", "MMPROJ"], name: str, outtype: OutType) -> None:
    """Add the fields that every file has to the library's writer.

    Args:
        writer: The writer.
        kind: The library's name of what the file holds.
        name: The model's name.
        outtype: How matrices are stored.
    """
    gguf = import_gguf()
    writer.add_type(getattr(gguf.GGUFType, kind))
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{MATRIX_TYPES[outtype]}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def matrix_type(shape: Sequence[int], outtype: OutType) -> GgufType:
    """Return how a tensor is stored; rows that Q8_0 cannot divide into groups are F16."""
    if len(shape) < 2:
        return "F32"
    chosen = MATRIX_TYPES[outtype]
    return "F16" if chosen == "Q8_0" and shape[-1] % _GROUP else chosen


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Attributes:
        name: Its name in the file.
        source: What it is computed from.
        kind: How its elements are stored.
        heads: Number of attention heads whose halves are interleaved; 0 leaves the rows in their order. llama.cpp's
            LLaMA rotates neighboring elements of a head, transformers' those that are half a head apart.
    """

    name: str
    source: TensorEntry | Tensor
    kind: GgufType
    heads: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.source.shape)

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        count = math.prod(self.shape)
        return count // _GROUP * (_GROUP + 2) if self.kind == "Q8_0" else count * (4 if self.kind == "F32" else 2)

    def blocks(self) -> Iterator[memoryview]:
        """Yield its bytes, from the first row to the last.

        Raises:
            WeightsError: The source is damaged, not finite, or exceeds the range of the stored numbers.
        """
        for block in self._rows():
            stored = _store(block, self.kind)
            if count_not_finite(block) or count_not_finite(stored):
                fix = "use weights that belong together, or outtype bf16, whose range is that of float32"
                raise not_finite_error(self.name, self.source, fix=fix)
            yield tensor_bytes(stored.contiguous())

    def _rows(self) -> Iterator[Tensor]:
        if self.heads:
            whole = read_tensor(self.source) if isinstance(self.source, TensorEntry) else self.source
            halves = whole.reshape(self.heads, 2, whole.shape[0] // self.heads // 2, *whole.shape[1:])
            yield halves.transpose(1, 2).reshape(whole.shape)
        elif isinstance(self.source, TensorEntry):
            yield from read_blocks(self.source)
        else:
            step = rows_per_block(self.shape)
            for start in range(0, self.shape[0], step):
                yield self.source[start : start + step]


def _store(block: Tensor, kind: GgufType) -> Tensor:
    import torch

    if kind == "Q8_0":
        gguf = import_gguf()
        quantized: Any = gguf.quants.quantize(block.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
        return torch.from_numpy(quantized)
    return block.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind])


def write_gguf(
    path: Path, architecture: str, describe: Callable[[Any], None], tensors: Sequence[GgufTensor]
) -> Iterator[int]:
    """Write a file.

    Args:
        path: The file to create.
        architecture: Its ``general.architecture``.
        describe: Adds the other fields to the library's writer.
        tensors: In the order of the file.

    Yields:
        The number of bytes of each tensor, after it was written.

    Raises:
        WeightsError: A tensor is damaged, not finite, or exceeds the range of the stored numbers.
        OSError: The disk is full or fails.
    """
    import numpy as np

    gguf = import_gguf()
    writer = gguf.GGUFWriter(None, architecture)
    describe(writer)
    for one in tensors:
        kind = gguf.GGMLQuantizationType[one.kind]
        writer.add_tensor_info(one.name, one.shape, np.dtype(np.float32), one.nbytes, raw_dtype=kind)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab", buffering=0) as file:
        _pad(file, writer.data_alignment)
        for one in tensors:
            start = file.tell()
            for block in one.blocks():
                _write_all(file, block)
            if file.tell() - start != one.nbytes:
                what = f"incomplete tensor (got {file.tell() - start} bytes, expected {one.nbytes})"
                raise WeightsError.at(f"{path.name}:{one.name}", what, DOWNLOAD_AGAIN)
            _pad(file, writer.data_alignment)
            yield one.nbytes


def _pad(file: Any, alignment: int) -> None:
    _write_all(file, memoryview(bytes(-file.tell() % alignment)))


def _write_all(file: Any, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += file.write(view[done:])
