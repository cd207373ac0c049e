"""Activation checkpointing: recompute the activations of as few layers as the free memory allows.

A layer that keeps its activations needs no second forward pass. The cost of keeping them is measured: the bytes that
autograd saves in one layer during the first forward pass. Once the gradients and the optimizer's states exist, each
batch's number of tokens and the free memory decide how many layers recompute.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from llavar_peft.models.chunked_loss import CHUNK
from llavar_peft.models.rank_agreement import largest_of_ranks
from llavar_peft.types import LayerCost
from llavar_peft.weights.io import tensor_names

logger = logging.getLogger(__name__)

_RESERVE = 0.1
"""Share of the free memory that is not used: for fragmentation, and for allocations of libraries."""
_ZERO_LIVE = 10**9
"""Number of gathered parameters that ZeRO-3 keeps (DeepSpeed's default of ``stage3_max_live_parameters``)."""
_BACKWARD = 2
"""Number of layers' activations that the backward pass through one layer needs in addition to those kept."""


class Recomputation:
    """Decides before each forward pass which layers of the language model keep their activations.

    Args:
        model: The model before it is wrapped; gradient checkpointing must be enabled on it.
        auto: Whether to decide at all; otherwise all layers stay as they are.
        device: The device of the model.
        free: Returns the number of bytes available on the device.

    Attributes:
        cost: What a layer keeps, once it was measured.
        gathered: Bytes of a layer's weights as FSDP or ZeRO-3 gathers them; 0 without either.
    """

    def __init__(
        self, model: Any, *, auto: bool, device: torch.device, free: Callable[[torch.device], int] | None = None
    ) -> None:
        self.layers = _language_layers(model) if auto else []
        self.device = device
        self.free = free or free_memory
        self.cost: LayerCost | None = None
        self.gathered = 0
        self.recomputed = len(self.layers)
        self._model = model
        self._tower_inputs = _tower_inputs(model) if auto else 0
        self._logits = 8 * CHUNK * model.get_output_embeddings().weight.shape[0] if auto else 0

    def plan(self, tokens: int, *, has_states: bool) -> None:
        """Set which layers recompute in the next forward pass.

        Args:
            tokens: Number of tokens of the pass, including padding.
            has_states: Whether the optimizer's states exist; before, they still need part of the free memory.
        """
        if not self.layers:
            return
        recomputed = len(self.layers)
        if self.cost is None:
            recomputed -= 1  # the layer that is measured
        elif has_states:
            recomputed -= self._affordable(self.cost, tokens)
        # Layers that recompute gather their shards again, in which all ranks must take part.
        recomputed = largest_of_ranks(recomputed)
        for number, layer in enumerate(self.layers):
            layer.gradient_checkpointing = number < recomputed
        if recomputed != self.recomputed:
            logger.debug("%d tokens: %d of %d layers recompute", tokens, recomputed, len(self.layers))
        self.recomputed = recomputed

    def _affordable(self, cost: LayerCost, tokens: int) -> int:
        """Return the number of layers whose activations fit into the free memory."""
        layers = len(self.layers)
        # Read each time, because sharding replaces the parameters.
        without_gradient = (p for p in self._model.parameters() if p.requires_grad and p.grad is None)
        gradients = sum(_local(parameter).numel() * parameter.element_size() for parameter in without_gradient)
        inputs = layers * cost.input_per_token * tokens + self._tower_inputs * tokens
        backward = _BACKWARD * cost.kept(tokens)
        other_uses = gradients + self._logits + inputs + backward + self._gathered_buffers()
        available = self.free(self.device) * (1 - _RESERVE) - other_uses
        # The input of a layer is kept in any case.
        per_layer = cost.kept(tokens) - cost.input_per_token * tokens
        return max(0, min(layers, int(available / per_layer)))

    def _gathered_buffers(self) -> float:
        """Return the bytes of whole weights and gradients that a backward pass gathers; 0 without FSDP and ZeRO-3.

        Two layers are gathered, the one in progress and the next one, while the gradients of the layer before are on
        their way to other ranks. With FSDP, the parts outside the layers, except the input embeddings, stay gathered
        from the forward pass on. ZeRO-3 releases weights when more than ``_ZERO_LIVE`` are gathered.
        """
        if not self.gathered:
            return 0.0
        parameters = list(self.layers[-1].parameters())
        in_layer = sum(map(_numel, parameters))
        trained_in_layer = sum(_numel(parameter) for parameter in parameters if parameter.requires_grad)
        in_model = sum(map(_numel, self._model.parameters()))
        if _is_partitioned(parameters[0]):
            numbers = max(2 * in_layer, min(in_model, _ZERO_LIVE))
        else:
            embeddings = _numel(self._model.get_input_embeddings().weight)
            outside_layers = in_model - in_layer * len(self.layers) - embeddings
            numbers = 2 * in_layer + outside_layers
        return float(self.gathered * (numbers + trained_in_layer) / in_layer)

    @contextmanager
    def measure(self, tokens: int) -> Iterator[None]:
        """Measure the cost of the last layer in the forward pass inside the context, unless it is known.

        Args:
            tokens: Number of tokens of the pass.
        """
        if not self.layers or self.cost is not None:
            yield
            return
        layer, saved = self.layers[-1], _SavedTensors()
        stack = ExitStack()

        sharded = any(isinstance(weight, DTensor) or _is_partitioned(weight) for weight in layer.parameters())

        def start(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            saved.exclude_parameters(layer)
            # FSDP has gathered the layer by now, in the number format of the computation; ZeRO-3 gathers it soon.
            weights = layer.parameters() if sharded else ()
            self.gathered = sum(_numel(weight) * weight.element_size() for weight in weights)
            hidden = arguments[0] if arguments else keywords["hidden_states"]
            saved.input_bytes = hidden.numel() * hidden.element_size()
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor))

        hooks = [
            layer.register_forward_pre_hook(start, with_kwargs=True),
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


class _SavedTensors:
    """The memory that autograd saves for a layer; each storage counts once.

    Attributes:
        by_token: Bytes of each storage that grows with the number of tokens.
        constant: Bytes of each storage that does not.
        input_bytes: Bytes of the layer's input.
    """

    def __init__(self) -> None:
        self.by_token: dict[int, int] = {}
        self.constant: dict[int, int] = {}
        self.input_bytes = 0
        self._parameters: set[int] = set()
        self._shapes: set[tuple[int, ...]] = set()

    def exclude_parameters(self, layer: nn.Module) -> None:
        """Exclude a layer's parameters, which exist anyway. A tensor of a parameter's shape is a copy of constant size.

        Args:
            layer: The layer that is about to run; sharded parameters are gathered.
        """
        parameters = list(layer.parameters())
        self._parameters = {id(_local(parameter).untyped_storage()) for parameter in parameters}
        self._shapes = {tuple(sorted(parameter.shape)) for parameter in parameters}

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves, and return it, as a hook for saved tensors does."""
        # A storage is one Python object as long as any tensor uses it.
        storage = tensor.untyped_storage()
        if id(storage) not in self._parameters:
            has_constant_size = tuple(sorted(tensor.shape)) in self._shapes
            sizes = self.constant if has_constant_size else self.by_token
            sizes[id(storage)] = storage.nbytes()
        return tensor


def _language_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and tensor_names.LAYER.search(f"{name}.")
    ]


def _tower_inputs(model: Any) -> int:
    """Return the bytes per token that a trained vision tower keeps, if all tokens are patches; a frozen one keeps 0.

    Its layers always recompute, so that only their inputs are kept.
    """
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    tower = plain.model.vision_tower
    if not any(parameter.requires_grad for parameter in tower.parameters()):
        return 0
    bytes_of_layer: int = tower.config.hidden_size * next(tower.parameters()).element_size()
    return bytes_of_layer * int(plain.model.num_tower_layers())


def _is_partitioned(parameter: Tensor) -> bool:
    """Return whether a parameter is one of ZeRO-3, which is empty while it is not gathered."""
    return hasattr(parameter, "ds_numel")


def _numel(parameter: Tensor) -> int:
    """Return the number of elements of a whole parameter."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor; any other tensor unchanged."""
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def free_memory(device: torch.device) -> int:
    """Return the number of bytes that this process can still allocate on a device.

    Args:
        device: For a CUDA device, the free memory and PyTorch's cache count, within the limit of the process. Otherwise
            the memory available on the machine, within the limit of the control group.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        capped = int(total * torch.cuda.get_per_process_memory_fraction(device)) - allocated
        return min(free + torch.cuda.memory_reserved(device) - allocated, capped)
    available = int(psutil.virtual_memory().available)
    limit_file, used_file = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit_file.is_file() and used_file.is_file():
        limit = limit_file.read_text().strip()
        if limit.isdigit():  # otherwise there is none
            available = min(available, int(limit) - int(used_file.read_text()))
    return max(0, available)
