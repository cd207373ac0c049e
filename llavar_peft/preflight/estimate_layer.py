"""The bytes that one layer needs in its backward pass, measured on tensors without memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from llavar_peft.compat.dependency_internals import fake_tensors
from llavar_peft.compat.memory_tracker import MemoryTracker
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.tuning import lora_config
from llavar_peft.recipe.schema import Full, Lora, Tune

_PREFIX = "model.language_model.layers.0"


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes of one layer, without its parameters.

    Attributes:
        input: Its input, which a layer that recomputes keeps.
        kept: All that is kept from the forward to the backward pass by a layer that does not recompute.
        backward: Peak of the backward pass, with what is kept, and the gradients that it makes.
    """

    input: int
    kept: int
    backward: int


@dataclass(frozen=True, slots=True)
class LayerDtypes:
    """The number formats of a layer in training.

    Attributes:
        frozen: Of parameters that are not trained.
        trained: Of parameters that are trained.
        stream: Of the hidden state between layers.
        autocast: Of the computation under autocast; None is without it.
    """

    frozen: torch.dtype
    trained: torch.dtype
    stream: torch.dtype
    autocast: torch.dtype | None


def measure_layer(
    config: LlavarConfig, tune: Tune, dtypes: LayerDtypes, *, tokens: int, accumulated: bool
) -> LayerMemory:
    """Measure a layer of the language model in the forward and backward pass of a stage.

    Args:
        config: The model's configuration.
        tune: What the stage trains.
        dtypes: Number formats. A quantized layer keeps as much as a frozen one in half precision.
        tokens: Tokens of the pass.
        accumulated: Whether gradients of an earlier pass exist, to which those of this pass are added.
    """
    text = _as_llama(config)
    with torch.device("meta"):
        layer = _as_trained(LlamaDecoderLayer(text, 0), tune)
    with fake_tensors(), MemoryTracker() as tracker:
        replace_parameters(layer, dtypes)
        rotary = LlamaRotaryEmbedding(text)(torch.zeros(1, dtype=dtypes.stream), torch.arange(tokens)[None])
        if accumulated:
            for parameter in layer.parameters():
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        shape = (1, tokens, text.hidden_size)
        stream = torch.zeros(shape, dtype=dtypes.stream, requires_grad=True)
        before = tracker.now
        with torch.autocast(
            "cpu", dtype=dtypes.autocast or torch.bfloat16, enabled=dtypes.autocast is not None, cache_enabled=False
        ):
            # The sum is released unless the layer keeps it, as the output of another layer is.
            output = layer(stream + 0.0, position_embeddings=rotary, position_ids=torch.arange(tokens)[None])
        # The output is the next layer's input, and is released before this layer's backward pass.
        outside = before + output.untyped_storage().nbytes()
        kept = tracker.now - outside
        tracker.reset_peak()
        output.backward(torch.empty_like(output))
        return LayerMemory(stream.untyped_storage().nbytes(), kept, tracker.peak - outside)


def _as_llama(config: LlavarConfig) -> LlamaConfig:
    """Return a LLaMA with the sizes of the language model, whose layers keep about as much as those of its kind."""
    text = config.text_config
    if isinstance(text, LlamaConfig):
        return LlamaConfig.from_dict(text.to_dict(), attn_implementation="sdpa")
    return LlamaConfig(
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab_size=text.vocab_size,
        attn_implementation="sdpa",
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
        for module in layer.modules():
            # Under autocast the adapters' input is not converted to float32.
            if hasattr(module, "cast_input_dtype_enabled"):
                setattr(module, "cast_input_dtype_enabled", False)  # noqa: B010 - it is no declared attribute
    return layer


def replace_parameters(layer: nn.Module, dtypes: LayerDtypes) -> None:
    """Replace the meta parameters and buffers of a layer, or of a tower, by fake ones on the CPU."""
    for module in layer.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype), persistent=False)
        holders = [module, *(child for child in module.children() if isinstance(child, nn.ParameterDict))]
        for holder in holders:
            for name, parameter in list(holder.named_parameters(recurse=False)):
                trained = parameter.requires_grad
                data = torch.empty(parameter.shape, dtype=dtypes.trained if trained else dtypes.frozen)
                holder.register_parameter(name, nn.Parameter(data, requires_grad=trained))
