"""How many layers' activations are computed again in the backward pass: as few as the free memory allows.

A layer that keeps its activations is spared a third pass through itself. What keeping costs is measured, not estimated:
the bytes that autograd saves in one layer during the first forward pass. Once gradients and optimizer states have been
there, each batch's tokens and the free memory decide.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from llavar_peft.models.chunked_loss import CHUNK

logger = logging.getLogger(__name__)

_SPARE = 0.1
"""Share of the free memory that is left alone: for fragments, and for what libraries take for themselves."""
_BACKWARD = 2
"""Layers' worth of activations that the backward pass through one layer needs beside what was kept."""


@dataclass(frozen=True)
class LayerCost:
    """What one layer keeps for its backward pass.

    Attributes:
        per_token: Bytes for each token.
        constant: Bytes whatever the tokens: under autocast, its weights in half precision.
        input_per_token: Bytes for each token that it keeps where it recomputes: its input.
    """

    per_token: float
    constant: int
    input_per_token: float

    def kept(self, tokens: int) -> float:
        """Bytes of a layer that keeps its activations."""
        return self.per_token * tokens + self.constant


class Recomputation:
    """Decides before each forward pass which layers of the language model keep their activations.

    Args:
        model: As it is trained, before it is wrapped; ``gradient_checkpointing_enable`` is the caller's.
        auto: Whether to decide at all; without, nothing is touched.
        device: Where it is trained.
        free: Gives the bytes that can still be had there.
    """

    def __init__(
        self, model: Any, *, auto: bool, device: torch.device, free: Callable[[torch.device], int] | None = None
    ) -> None:
        self.layers = _language_layers(model) if auto else []
        self.device = device
        self.free = free or free_memory
        self.cost: LayerCost | None = None
        self.recomputed = len(self.layers)
        self._model = model
        self._logits = 8 * CHUNK * model.get_output_embeddings().weight.shape[0] if auto else 0

    def plan(self, tokens: int, *, settled: bool) -> None:
        """Say which layers recompute in the next forward pass.

        Args:
            tokens: Of the pass, padding included.
            settled: Whether the optimizer has its states; before, memory that looks free is not.
        """
        if not self.layers:
            return
        count = len(self.layers)
        if self.cost is None:
            count -= 1  # the one that is measured
        elif settled:
            count -= self._affordable(self.cost, tokens)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Sharded layers are gathered again where they recompute: all ranks have to do the same.
            agreed = torch.tensor(count, device=self.device)
            torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
            count = int(agreed)
        for number, layer in enumerate(self.layers):
            layer.gradient_checkpointing = number < count
        if count != self.recomputed:
            logger.debug("%d tokens: %d of %d layers recompute", tokens, count, len(self.layers))
        self.recomputed = count

    def _affordable(self, cost: LayerCost, tokens: int) -> int:
        layers = len(self.layers)
        # Looked up each time: sharding puts other parameters in their places.
        missing = (one for one in self._model.parameters() if one.requires_grad and one.grad is None)
        gradients = sum(_local(one).numel() * one.element_size() for one in missing)
        inputs = layers * cost.input_per_token * tokens
        others = gradients + self._logits + inputs + _BACKWARD * cost.kept(tokens)
        room = self.free(self.device) * (1 - _SPARE) - others
        return max(0, min(layers, int(room / (cost.kept(tokens) - cost.input_per_token * tokens))))

    @contextmanager
    def measuring(self, tokens: int) -> Iterator[None]:
        """Measure the last layer in the forward pass within, if that has not been done.

        Args:
            tokens: Of the pass.
        """
        if not self.layers or self.cost is not None:
            yield
            return
        layer, saved = self.layers[-1], _Saved()
        stack = ExitStack()

        def before(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            saved.know(layer)
            hidden = arguments[0] if arguments else keywords["hidden_states"]
            saved.input_bytes = hidden.numel() * hidden.element_size()
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(saved.note, lambda tensor: tensor))

        hooks = [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(lambda *_: stack.close(), always_call=True),
        ]
        try:
            yield
        finally:
            stack.close()
            for hook in hooks:
                hook.remove()
        if saved.by_token:
            self.cost = LayerCost(
                per_token=sum(saved.by_token.values()) / tokens,
                constant=sum(saved.constant.values()),
                input_per_token=saved.input_bytes / tokens,
            )


class _Saved:
    """What autograd keeps of a layer, each piece of memory once."""

    def __init__(self) -> None:
        self.by_token: dict[int, int] = {}
        self.constant: dict[int, int] = {}
        self.input_bytes = 0
        self._own: set[int] = set()
        self._shapes: set[tuple[int, ...]] = set()

    def know(self, layer: nn.Module) -> None:
        """A layer's own parameters cost nothing more; what has the shape of one is a copy that grows with no token.

        Args:
            layer: About to run, its parameters gathered if they are sharded.
        """
        parameters = list(layer.parameters())
        self._own = {_local(one).untyped_storage().data_ptr() for one in parameters}
        self._shapes = {tuple(sorted(one.shape)) for one in parameters}

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            kind = self.constant if tuple(sorted(tensor.shape)) in self._shapes else self.by_token
            kind[storage.data_ptr()] = storage.nbytes()
        return tensor


def _language_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and "language_model.layers." in name
    ]


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other as it is."""
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device, in this process.

    Args:
        device: A CUDA device: what is free there and in PyTorch's cache, within the process's cap. Else: the memory
            that the machine, or the process's control group, has left.

    Returns:
        The bytes.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        capped = int(total * torch.cuda.get_per_process_memory_fraction(device)) - allocated
        return min(free + torch.cuda.memory_reserved(device) - allocated, capped)
    available = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
        available = min(available, int(most) - int(used.read_text()))
    return max(0, available)
