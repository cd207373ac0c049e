"""The bytes that one layer keeps for its backward pass, measured on tensors without memory."""

from __future__ import annotations

import dataclasses
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llavar_peft.compat.dependency_internals import fake_tensors
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.tuning import lora_config
from llavar_peft.recipe.schema import Full, Lora, Tune
from llavar_peft.types import LayerCost

_TOKENS = 251
"""A prime that is no dimension of a layer, so that tensors with a token axis differ from all others in shape."""
_PREFIX = "model.language_model.layers.0"


def layer_cost(config: LlavarConfig, tune: Tune, *, weights: torch.dtype, autocast: torch.dtype | None) -> LayerCost:
    """Measure a layer of the language model in the forward pass of a stage.

    Args:
        config: The model's configuration.
        tune: What the stage trains.
        weights: Dtype of the frozen weights; trained ones are float32.
        autocast: Dtype of the computation, if it differs from the weights'.

    Returns:
        The cost. A quantized layer costs as much as a frozen one in half precision.
    """
    text = LlamaConfig.from_dict(config.text_config.to_dict(), attn_implementation="sdpa")
    with torch.device("meta"):
        layer = _as_trained(LlamaDecoderLayer(text, 0), tune)
    with fake_tensors():
        _replace_parameters(layer, frozen=weights)
        # Trained embeddings are float32, and so is then the hidden state between the layers.
        stream = torch.float32 if isinstance(tune, Full) else weights
        hidden_1TD = torch.zeros(1, _TOKENS, text.hidden_size, dtype=stream, requires_grad=True)
        positions_1T = torch.arange(_TOKENS)[None]
        rotary = LlamaRotaryEmbedding(text)(hidden_1TD, positions_1T)
        saved = _MeasuredTensors(layer)
        with (
            torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None),
            torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda box: box.tensor),
        ):
            output = layer(hidden_1TD, position_embeddings=rotary, position_ids=positions_1T)
        by_token, constant = saved.bytes()
        del output  # kept the graph, and with it the saved tensors, until here
    return LayerCost(
        per_token=by_token / _TOKENS,
        constant=constant,
        input_per_token=text.hidden_size * hidden_1TD.element_size(),
    )


def _as_trained(layer: nn.Module, tune: Tune) -> nn.Module:
    layer.requires_grad_(isinstance(tune, Full))
    layer.train()
    if isinstance(tune, Lora):
        from peft import inject_adapter_in_model

        # PiSSA's initialization needs the weights' values; its saved tensors are those of plain LoRA.
        settings = lora_config(dataclasses.replace(tune, variant="lora") if tune.variant == "pissa" else tune)
        settings.modules_to_save = None
        settings.trainable_token_indices = None
        # The layer is nested under the names by which the adapter's configuration selects layers.
        root = parent = nn.Module()
        *names, last = _PREFIX.split(".")
        for name in names:
            child = nn.Module()
            parent.add_module(name, child)
            parent = child
        parent.add_module(last, layer)
        inject_adapter_in_model(settings, root, low_cpu_mem_usage=True)
    return layer


def _replace_parameters(layer: nn.Module, *, frozen: torch.dtype) -> None:
    """Replace the meta parameters by fake ones on the CPU; trained ones become float32."""
    for module in layer.modules():
        holders = [module, *(child for child in module.children() if isinstance(child, nn.ParameterDict))]
        for holder in holders:
            for name, parameter in list(holder.named_parameters(recurse=False)):
                trained = parameter.requires_grad
                data = torch.empty(parameter.shape, dtype=torch.float32 if trained else frozen)
                holder.register_parameter(name, nn.Parameter(data, requires_grad=trained))


class _MeasuredTensors:
    """The tensors that autograd saves, except the layer's own parameters, which need no additional memory."""

    def __init__(self, layer: nn.Module) -> None:
        parameters = list(layer.parameters())
        self._storages = {parameter.untyped_storage() for parameter in parameters}
        self._shapes = {tuple(sorted(parameter.shape)) for parameter in parameters}
        self._boxes = WeakSet[_Box]()

    def pack(self, tensor: Tensor) -> _Box:
        box = _Box(tensor)
        self._boxes.add(box)
        return box

    def bytes(self) -> tuple[int, int]:
        """Return the bytes that grow with the tokens, and those of tensors in the shape of a parameter."""
        # A storage is one Python object for all tensors that share it; several of them count once.
        by_token, constant = set[torch.UntypedStorage](), set[torch.UntypedStorage]()
        for box in self._boxes:
            storage = box.tensor.untyped_storage()
            if storage not in self._storages:
                (constant if tuple(sorted(box.tensor.shape)) in self._shapes else by_token).add(storage)
        return sum(one.nbytes() for one in by_token), sum(one.nbytes() for one in constant)


class _Box:
    """A saved tensor; it is released together with the graph that saved it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
