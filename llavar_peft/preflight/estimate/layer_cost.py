"""What one layer keeps for its backward pass, measured on tensors that have shapes and no memory."""

from __future__ import annotations

import dataclasses
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.tuning import lora_config
from llavar_peft.recipe.schema import Full, Lora, Tune
from llavar_peft.training.activation_checkpointing import LayerCost

_TOKENS = 251
"""No width of a layer, by which what grows with the tokens is told from what does not."""
_PREFIX = "model.language_model.layers.0"


def layer_cost(config: LlavarConfig, tune: Tune, *, weights: torch.dtype, autocast: torch.dtype | None) -> LayerCost:
    """Run a layer of the language model as the stage would, on tensors without memory.

    Args:
        config: The model's.
        tune: What the stage trains.
        weights: Of the frozen weights; trained ones are float32.
        autocast: What the stage computes in, if not in the weights' own.

    Returns:
        Its cost. A quantized layer keeps what a frozen one in half precision does.
    """
    text = config.text_config
    text._attn_implementation = "sdpa"
    with torch.device("meta"):
        layer = _as_trained(LlamaDecoderLayer(text, 0), tune)
    with FakeTensorMode():
        _restore(layer, frozen=weights)
        # Trained embeddings are float32, and the stream between the layers stays what they give.
        stream = torch.float32 if isinstance(tune, Full) else weights
        hidden_1TD = torch.zeros(1, _TOKENS, text.hidden_size, dtype=stream, requires_grad=True)
        positions_1T = torch.arange(_TOKENS)[None]
        rotary = LlamaRotaryEmbedding(text)(hidden_1TD, positions_1T)
        kept = _Kept(layer)
        with (
            torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None),
            torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda box: box.tensor),
        ):
            output = layer(hidden_1TD, position_embeddings=rotary, position_ids=positions_1T)
        by_token, constant = kept.bytes()
        del output  # till here it kept the graph
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

        # Its start from the base's numbers needs numbers; it keeps what any other keeps.
        settings = lora_config(dataclasses.replace(tune, variant="lora") if tune.variant == "pissa" else tune)
        settings.modules_to_save = None
        settings.trainable_token_indices = None
        inject_adapter_in_model(settings, _rooted(layer), low_cpu_mem_usage=True)
    return layer


def _restore(layer: nn.Module, *, frozen: torch.dtype) -> None:
    """Put a tensor that autograd takes for one on the CPU in each parameter's place; trained ones in float32."""
    for module in layer.modules():
        holders = [module, *(one for one in module.children() if isinstance(one, nn.ParameterDict))]
        for holder in holders:
            for name, parameter in list(holder.named_parameters(recurse=False)):
                learns = parameter.requires_grad
                made = torch.empty(parameter.shape, dtype=torch.float32 if learns else frozen)
                holder.register_parameter(name, nn.Parameter(made, requires_grad=learns))


def _rooted(layer: nn.Module) -> nn.Module:
    """The layer below the names by which adapters find it."""
    root = inner = nn.Module()
    *way, last = _PREFIX.split(".")
    for name in way:
        child = nn.Module()
        inner.add_module(name, child)
        inner = child
    inner.add_module(last, layer)
    return root


class _Kept:
    """What autograd keeps, each piece of memory once; the layer's own parameters cost nothing more."""

    def __init__(self, layer: nn.Module) -> None:
        parameters = list(layer.parameters())
        self._own = {one.untyped_storage()._cdata for one in parameters}
        self._shapes = {tuple(sorted(one.shape)) for one in parameters}
        self._boxes = WeakSet[_Box]()

    def pack(self, tensor: Tensor) -> _Box:
        box = _Box(tensor)
        self._boxes.add(box)
        return box

    def bytes(self) -> tuple[int, int]:
        """Of what is kept still: what grows with the tokens, and what has the shape of a parameter."""
        by_token, constant = dict[int, int](), dict[int, int]()
        for box in self._boxes:
            storage = box.tensor.untyped_storage()
            if storage._cdata not in self._own:
                kind = constant if tuple(sorted(box.tensor.shape)) in self._shapes else by_token
                kind[storage._cdata] = storage.nbytes()
        return sum(by_token.values()), sum(constant.values())


class _Box:
    """Around a tensor that is kept: gone with the graph that keeps it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
