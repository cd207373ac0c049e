"""Conversion between layouts: the same weights in other files or another dtype, and stock LLaVA's two-layer projector.

Our one linear projector can be written as two layers in two forms:
``linear``     The activation is the identity: linear_1 = W, linear_2 = 1. For stock ``transformers``. vLLM's own LLaVA
               knows the identity by another name (``VLLM_IDENTITY``), which stock ``transformers`` does not.
``two-sided``  The activation is ReLU: linear_1 = [1; -1], linear_2 = [W, -W], as relu(x) - relu(-x) = x exactly. For
               vLLM without further options. Requires a language model at least twice as wide as the tower, because
               stock LLaVA is as wide as the language model between the two layers; pairs of another activation, such
               as gelu(x) - gelu(-x) = x, need as many positions. LLaVAR's widths are 5120 and 1024.

Source: vLLM 0.32.0, vllm/model_executor/layers/activation.py (``get_act_fn``, ``_ACTIVATION_REGISTRY``).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llavar_peft.errors import ConfigError, WeightsError
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.folder_writer import FolderWriter, WeightsReport
from llavar_peft.weights.io.shard_layout import TensorSpec, WeightsFormat
from llavar_peft.weights.io.tensor_blocks import read_blocks, tensor_bytes
from llavar_peft.weights.io.tensor_table import DOWNLOAD_AGAIN, TensorEntry, dtype_name, torch_dtype
from llavar_peft.weights.io.write_weights import Progress, identify_files, write_weights

if TYPE_CHECKING:
    from torch import Tensor

ProjectorForm = Literal["linear", "two-sided"]
ACTIVATIONS: dict[str, str] = {"linear": "linear", "two-sided": "relu"}
"""``projector_hidden_act`` of each form."""
VLLM_IDENTITY = "torch.nn.modules.linear.Identity"
"""The name by which vLLM's own LLaVA takes the activation of the form ``linear``."""
_PARTS = ("1.weight", "1.bias", "2.weight", "2.bias")


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
        tensors: By their names in the result.
        out: Folder to create.
        dtype: Torch's name of the result's dtype; None keeps each tensor's own.
        form: Format of the files.
        shard_size: Maximum size of a file in bytes.
        finish: Adds other files, before the folder gets its name.
        progress: Called after each tensor with the number of bytes written and the total.

    Raises:
        WeightsError: A tensor is damaged, not finite, or exceeds the range of the dtype.
    """
    specs = [TensorSpec(name, tuple(one.shape), dtype or dtype_name(one)) for name, one in tensors.items()]
    entries = [one for one in tensors.values() if isinstance(one, TensorEntry)]
    made = [(name, zlib.crc32(tensor_bytes(one))) for name, one in tensors.items() if not isinstance(one, TensorEntry)]

    def blocks(spec: TensorSpec) -> Iterator[Tensor]:
        source = tensors[spec.name]
        for block in read_blocks(source) if isinstance(source, TensorEntry) else [source]:
            yield block.to(torch_dtype(spec.dtype))

    plan = repr([identify_files(one.path for one in entries), made])
    writer = FolderWriter(out, specs, form=form, shard_size=shard_size, plan=plan)
    return write_weights(writer, blocks, sources=lambda name: [tensors[name]], finish=finish, progress=progress)


def to_two_layers(weight: Tensor, bias: Tensor, form: ProjectorForm) -> dict[str, Tensor]:
    """Write a linear map as two layers.

    Args:
        weight: The projector's weight, ``[D, C]``.
        bias: The projector's bias, ``[D]``.
        form: Form of the two layers.

    Returns:
        Four tensors by our names below ``STOCK_PROJECTOR``, in the projector's dtype.

    Raises:
        ConfigError: ``two-sided`` and D < 2 C.
    """
    import torch

    width, inner = weight.shape
    first, second = torch.zeros_like(weight), torch.zeros(width, width, dtype=weight.dtype)
    if form == "linear":
        first, second = weight.clone(), torch.eye(width, dtype=weight.dtype)
        biases = (bias.clone(), torch.zeros_like(bias))
    else:
        if width < 2 * inner:
            what = (
                f"'two-sided' requires a language model twice as wide as the tower (got {width} and {inner}), because "
                "stock LLaVA is as wide as its language model between the projector's layers"
            )
            override = f'--hf-overrides \'{{"projector_hidden_act": "{VLLM_IDENTITY}"}}\''
            raise ConfigError.at(
                "projector", what, f"use the form 'linear', and start vLLM with {override} or --model-impl transformers"
            )
        one = torch.eye(inner, dtype=weight.dtype)
        first[:inner], first[inner : 2 * inner] = one, -one
        second[:, :inner], second[:, inner : 2 * inner] = weight, -weight
        biases = (torch.zeros_like(bias), bias.clone())
    values = (first, biases[0], second, biases[1])
    return {tensor_names.STOCK_PROJECTOR + part: value for part, value in zip(_PARTS, values, strict=True)}


def to_one_layer(tensors: Mapping[str, Tensor], activation: str, where: str) -> tuple[Tensor, Tensor]:
    """Convert two layers back to the single one that they were made from.

    Args:
        tensors: By our names, with four below ``STOCK_PROJECTOR``.
        activation: ``projector_hidden_act``.
        where: The folder, for the message.

    Returns:
        Weight ``[D, C]`` and bias ``[D]``, bit-equal to the original.

    Raises:
        WeightsError: A layer is missing, or the two are not one linear map in either form.
    """
    missing = [part for part in _PARTS if tensor_names.STOCK_PROJECTOR + part not in tensors]
    if missing:
        what = f"tensors missing from the projector: linear_{', linear_'.join(missing)}"
        raise WeightsError.at(where, what, DOWNLOAD_AGAIN)
    stored = {part: tensors[tensor_names.STOCK_PROJECTOR + part] for part in _PARTS}
    inner = stored["1.weight"].shape[1]
    found = {
        "linear": (stored["1.weight"], stored["1.bias"]),
        "relu": (stored["2.weight"][:, :inner], stored["2.bias"]),
    }.get(activation)
    form = next((form for form, name in ACTIVATIONS.items() if name == activation), None)
    if found is not None and form is not None and found[0].shape[0] == found[1].shape[0]:
        again = to_two_layers(*found, form)  # type: ignore[arg-type]
        if all(stored[part].equal(again[tensor_names.STOCK_PROJECTOR + part]) for part in _PARTS):
            return found[0].contiguous(), found[1]
    raise WeightsError.at(
        where,
        f"the two layers of the projector are not one linear map (projector_hidden_act {activation!r})",
        "use this model with stock transformers; LLaVAR has a single linear layer",
    )
