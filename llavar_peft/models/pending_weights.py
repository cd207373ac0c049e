"""The values of parameters that have no memory yet: where they are on disk, and how parts of them are read.

A process that holds only a shard of a model must not load the whole of it. Its parameters therefore are on the device
``meta`` until they are sharded; each shard is then read from the files, which the processes of a node share through the
operating system's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llavar_peft.weights.io.joined_rows import JoinedRows, read_rows
from llavar_peft.weights.io.tensor_blocks import rows_per_block

_META = torch.device("meta")


class PendingWeights:
    """The stored values of a model's parameters on the device ``meta``.

    They stay with the parameters while the model is tuned and wrapped, whatever the parameters are then called.

    Args:
        dtype: The model's. Values of another dtype are rounded to it, as they are in a model that is loaded at once.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._stored: dict[Tensor, tuple[Tensor | JoinedRows, torch.dtype | None]] = {}

    def add(self, parameter: Tensor, stored: Tensor | JoinedRows) -> None:
        """Set the values of a parameter."""
        self._stored[parameter] = (stored, self.dtype)

    def replace(self, parameter: Tensor, stored: Tensor) -> None:
        """Set other values, such as those of a checkpoint, which keep their precision."""
        self._stored[parameter] = (stored, None)

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._stored

    def names(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return the parameters of a model that are pending, by name."""
        return {name: parameter for name, parameter in model.named_parameters() if parameter in self._stored}

    def read(self, parameter: Tensor, start: int, stop: int) -> Tensor:
        """Read rows of a parameter.

        Returns:
            The rows in the model's dtype; in their own dtype if they were set by ``replace``.
        """
        stored, dtype = self._stored[parameter]
        rows = read_rows(stored, start, stop)
        return rows if dtype is None else rows.to(dtype)

    def copy_rows(self, parameter: Tensor, start: int, target: Tensor) -> None:
        """Read rows of a parameter into a tensor, block by block.

        Args:
            parameter: The parameter.
            start: The first row.
            target: Its first dimension is the number of rows; of any dtype, on any device.
        """
        with torch.no_grad():
            step = rows_per_block(tuple(target.shape))
            for first in range(0, target.shape[0], step):
                last = min(first + step, target.shape[0])
                target[first:last].copy_(self.read(parameter, start + first, start + last))

    def fill(self, model: nn.Module, device: torch.device) -> None:
        """Read all pending parameters of a model onto a device, and move the rest of the model there, in place."""
        loaded: dict[Tensor, nn.Parameter] = {}
        for module, name, parameter in pending_places(model):
            if parameter not in loaded:  # tied embeddings are one parameter in two places
                loaded[parameter] = self.load(parameter, device)
            setattr(module, name, loaded[parameter])
        model.to(device)

    def load(self, parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
        """Return a parameter on a device with the values of a pending one, in its dtype."""
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        self.copy_rows(parameter, 0, values)
        return nn.Parameter(values, requires_grad=parameter.requires_grad)


def pending_places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Return the parameters of a model that are on ``meta``, each with its module and its name there."""
    return [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.device == _META
    ]


@contextmanager
def without_memory_on_cpu(model: nn.Module) -> Iterator[None]:
    """Give a model's parameters on ``meta`` tensors of zeros on the CPU that share the memory of one number.

    peft moves new adapters onto the device of the layer that they belong to; on ``meta`` their values would be lost.
    """
    places = pending_places(model)
    for module, name, parameter in places:
        zeros = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
        setattr(module, name, nn.Parameter(zeros, requires_grad=False))
    try:
        yield
    finally:
        for module, name, parameter in places:
            setattr(module, name, parameter)


def set_adapter_values(wrapped: Any, pending: PendingWeights, adapter: str = "default") -> None:
    """Set the values of new adapters that depend on the base: trained rows of the embeddings, and DoRA's magnitudes.

    Args:
        wrapped: A ``PeftModel`` that was made inside ``without_memory_on_cpu``.
        pending: The values of its base.
        adapter: The adapter's name in peft.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    with torch.no_grad():
        for layer in wrapped.modules():
            if isinstance(layer, TrainableTokensLayer):
                indices = layer.token_indices[adapter]
                rows = pending.read(layer.get_base_layer().weight, indices[0], indices[-1] + 1)
                layer.trainable_tokens_delta[adapter].copy_(rows)
                layer.trainable_tokens_original[adapter].copy_(rows)
            elif isinstance(layer, LoraLayer) and layer.use_dora.get(adapter):
                # New adapters change nothing: their B is zero.
                layer.lora_magnitude_vector[adapter].weight.copy_(_row_norms(layer.get_base_layer().weight, pending))


def _row_norms(weight: Tensor, pending: PendingWeights) -> Tensor:
    step = rows_per_block(tuple(weight.shape))
    blocks = (
        pending.read(weight, first, min(first + step, weight.shape[0])) for first in range(0, weight.shape[0], step)
    )
    return torch.cat([torch.linalg.norm(block, dim=1).to(block.dtype) for block in blocks])
