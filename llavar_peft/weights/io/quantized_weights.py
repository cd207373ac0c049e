"""Weights that are stored in 4 bits, in the layout that bitsandbytes and transformers write.

A matrix ``NAME.weight`` becomes six tensors: ``NAME.weight`` with two numbers in each byte, and five beside it, whose
names begin with it: the scales of its blocks and of those scales, the values of the codes, and a JSON object with the
rest.

Source: bitsandbytes, functional.py, ``QuantState.as_dict(packed=True)``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, Literal

from llavar_peft.errors import ConfigError, MissingDependencyError, WeightsError
from llavar_peft.weights.io.folder_writer import FolderWriter, WeightsReport
from llavar_peft.weights.io.shard_layout import TensorSpec
from llavar_peft.weights.io.tensor_blocks import count_not_finite, not_finite_error, read_blocks, read_tensor
from llavar_peft.weights.io.tensor_table import DOWNLOAD_AGAIN, TensorEntry, dtype_name, torch_dtype
from llavar_peft.weights.io.write_weights import Progress, identify_files, write_weights

if TYPE_CHECKING:
    from torch import Tensor

QUANTIZATION: Final = "quantization_config"
"""The key of ``config.json`` by which transformers recognizes quantized weights."""
UNQUANTIZED: Final = "unquantized"
"""In the file of fingerprints of a quantized folder: that of the weights that it was made from."""
UNQUANTIZED_TOWER: Final = "unquantized_tower"
STATE: Final = ".quant_state.bitsandbytes__nf4"
_BLOCK, _SCALES_BLOCK, _CODES, _SCALE_CODES = 64, 256, 16, 256
_STATE_BYTES = 192
"""Length of the JSON object. It is filled up with spaces, so that sizes of files are known before they are written."""
_SETTINGS = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": "uint8",
}  # fmt: skip


def stored_quantization(config: Mapping[str, Any], folder: str | Path) -> Literal["nf4"] | None:
    """Return how the weights beside a ``config.json`` are quantized.

    Raises:
        ConfigError: In another way than ``llavar-peft convert --quantize nf4`` does.
    """
    found = config.get(QUANTIZATION)
    if found is None:
        return None
    got = {name: found.get(name) for name in _SETTINGS} if isinstance(found, Mapping) else {}
    odd = next((name for name, value in _SETTINGS.items() if got.get(name) != value), None)
    if odd is not None:
        raise ConfigError.at(
            f"{folder}/config.json:{QUANTIZATION}.{odd}",
            f"weights that are quantized in a way that is not supported (got {ascii(got.get(odd))[:80]}, expected "
            f"{_SETTINGS[odd]!r})",
            "use the unquantized model, which `llavar-peft convert --to llavar --quantize nf4` quantizes",
        )
    return "nf4"


def quantized_dtype(config: Mapping[str, Any]) -> str:
    """Return torch's name of the dtype that quantized weights had before, from their ``config.json``."""
    return str(config[QUANTIZATION].get("bnb_4bit_compute_dtype"))


def check_unquantized(config: Mapping[str, Any], folder: str | Path, purpose: str) -> None:
    """Reject quantized weights where the original numbers are needed.

    Args:
        config: The folder's ``config.json``.
        folder: The folder.
        purpose: What they are needed for, for the message.

    Raises:
        ConfigError: The weights are quantized.
    """
    if config.get(QUANTIZATION) is not None:
        raise ConfigError.at(
            str(folder),
            f"its weights are stored in 4 or 8 bits, and {purpose} needs the original numbers",
            "give the unquantized model that it was converted from",
        )


def packed_specs(name: str, shape: tuple[int, ...]) -> list[TensorSpec]:
    """Return what a matrix is stored as.

    Args:
        name: Its name, which ends in ``.weight``.
        shape: Its shape before it was quantized.
    """
    numel = math.prod(shape)
    scales = -(-numel // _BLOCK)
    return [
        TensorSpec(name, (-(-numel // 2), 1), "uint8"),
        TensorSpec(f"{name}.absmax", (scales,), "uint8"),
        TensorSpec(f"{name}.quant_map", (_CODES,), "float32"),
        TensorSpec(f"{name}.nested_absmax", (-(-scales // _SCALES_BLOCK),), "float32"),
        TensorSpec(f"{name}.nested_quant_map", (_SCALE_CODES,), "float32"),
        TensorSpec(f"{name}{STATE}", (_STATE_BYTES,), "uint8"),
    ]


def pack_tensor(weight: Tensor, name: str) -> dict[str, Tensor]:
    """Quantize a matrix as bitsandbytes does when a model is loaded.

    Returns:
        What ``packed_specs`` announces, by name.
    """
    import torch

    functional: Any = importlib.import_module("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(
        weight.contiguous(), blocksize=_BLOCK, quant_type="nf4", compress_statistics=True
    )
    parts: dict[str, Tensor] = {name: packed}
    parts.update({f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()})
    text = bytes(parts[name + STATE].tolist()).ljust(_STATE_BYTES)
    parts[name + STATE] = torch.tensor(list(text), dtype=torch.uint8)
    return parts


def check_packed(tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], folder: str) -> None:
    """Reject descriptions of packed matrices that contradict the model, which bitsandbytes would crash on.

    Args:
        tensors: By name; those of ``packed_specs`` have the right shapes.
        shapes: Shape of each packed matrix before it was quantized.
        folder: For messages.

    Raises:
        WeightsError: Names the tensor.
    """
    for name, shape in shapes.items():
        try:
            state = json.loads(bytes(tensors[name + STATE].tolist()))
            got = (state["shape"], state["blocksize"], state["nested_blocksize"], state["quant_type"])
            known = isinstance(state["nested_offset"], float) and state["nested_dtype"] == "float32"
            dtype_known = state["dtype"] in ("float32", "bfloat16", "float16")
        except (ValueError, KeyError, TypeError) as error:
            what = f"not a description of a matrix in 4 bits ({type(error).__name__})"
            raise WeightsError.at(f"{folder}:{name}{STATE}", what, DOWNLOAD_AGAIN) from error
        if got != (list(shape), _BLOCK, _SCALES_BLOCK, "nf4") or not (known and dtype_known):
            what = f"describes another matrix (got {ascii(got)[:120]}, expected the shape {shape})"
            raise WeightsError.at(f"{folder}:{name}{STATE}", what, DOWNLOAD_AGAIN)


class _PackedLayer:
    """A matrix that is quantized when the first of its parts is asked for, and forgotten with the last."""

    def __init__(self, name: str, source: TensorEntry | Tensor, dtype: str) -> None:
        self._name, self._source, self._dtype = name, source, dtype
        self._lock = Lock()
        self._parts: dict[str, Tensor] = {}

    def take(self, part: str) -> Tensor:
        with self._lock:
            if part not in self._parts:
                self._parts = self._pack()
            return self._parts.pop(part)

    def _pack(self) -> dict[str, Tensor]:
        weight = read_tensor(self._source) if isinstance(self._source, TensorEntry) else self._source
        weight = weight.to(torch_dtype(self._dtype))
        if count_not_finite(weight):
            raise not_finite_error(self._name, self._source)
        return pack_tensor(weight, self._name)


def write_quantized(
    tensors: Mapping[str, TensorEntry | Tensor],
    out: Path,
    *,
    packed: Iterable[str],
    packed_dtype: str,
    dtype: str | None,
    shard_size: int,
    finish: Callable[[Path], None],
    progress: Progress | None,
) -> WeightsReport:
    """Write tensors to a new folder, some of them in 4 bits; a few matrices at most are in memory.

    Args:
        tensors: By name.
        out: Folder to create.
        packed: Names of the matrices to store in 4 bits.
        packed_dtype: Torch's name of the dtype that these are converted to before they are quantized.
        dtype: Dtype of all others; None keeps each tensor's own.
        shard_size: Maximum size of a file in bytes.
        finish: Adds other files, before the folder gets its name.
        progress: Called after each tensor with the number of bytes written and the total.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
        WeightsError: A tensor is damaged, not finite, or exceeds the range of the dtype.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        what = "nf4 needs bitsandbytes, which is not installed"
        raise MissingDependencyError.at("quantize", what, "pip install bitsandbytes")
    layers = {name: _PackedLayer(name, tensors[name], packed_dtype) for name in packed}
    specs: list[TensorSpec] = []
    owner: dict[str, str] = {}
    for name, one in tensors.items():
        shape = tuple(one.shape)
        parts = packed_specs(name, shape) if name in layers else [TensorSpec(name, shape, dtype or dtype_name(one))]
        owner.update({part.name: name for part in parts})
        specs += parts

    def blocks(spec: TensorSpec) -> Iterator[Tensor]:
        name = owner[spec.name]
        if name in layers:
            yield layers[name].take(spec.name)
            return
        source = tensors[name]
        for block in read_blocks(source) if isinstance(source, TensorEntry) else [source]:
            yield block.to(torch_dtype(spec.dtype))

    files = identify_files(one.path for one in tensors.values() if isinstance(one, TensorEntry))
    writer = FolderWriter(
        out, specs, form="safetensors", shard_size=shard_size, plan=repr(["nf4", packed_dtype, dtype, files])
    )
    return write_weights(writer, blocks, sources=lambda name: [tensors[owner[name]]], finish=finish, progress=progress)
