"""The bytes that one layer needs in its backward pass, measured on tensors without memory."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from llavar_peft.compat.dependency_internals import fake_tensors
from llavar_peft.compat.memory_tracker import MemoryTracker
from llavar_peft.models.cross_attention import CrossAttentionStack, Detail, DetailSegment
from llavar_peft.models.cross_attention_hooks import DETAIL, attach_cross_attention
from llavar_peft.models.decoder_structure import find_layers
from llavar_peft.models.linear_layers import find_linear_layers
from llavar_peft.models.tuning import lora_config
from llavar_peft.preflight.estimate_views import DetailShape
from llavar_peft.recipe.schema import Attention, Full, Lora, Tune

_PREFIX = "model.language_model.layers.0"


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes of one layer, without its parameters.

    Attributes:
        input: Its input, which a layer that recomputes keeps.
        kept: All that is kept from the forward to the backward pass by a layer that does not recompute.
        backward: Peak of the backward pass, with what is kept, and the gradients that it makes.
        shared: What all layers share: the mask, and the rotary embedding.
    """

    input: int
    kept: int
    backward: int
    shared: int


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


def computes_scores(text: PretrainedConfig, attention: Attention) -> bool:
    """Return whether a GPU computes all attention scores of a row at once, and pads rows: the eager attention."""
    is_capped = getattr(text, "attn_logit_softcapping", None) is not None
    return attention == "eager" or (is_capped and attention in ("auto", "sdpa"))


def measure_layer(
    text: PretrainedConfig,
    tune: Tune,
    dtypes: LayerDtypes,
    *,
    rows: tuple[int, int],
    eager: bool,
    accumulated: bool,
    details: DetailShape | None = None,
    images: int = 0,
) -> LayerMemory:
    """Measure a layer of the language model in the forward and backward pass of a stage.

    The decoder is that of transformers, with its first layer only.

    Args:
        text: The language model's configuration.
        tune: What the stage trains.
        dtypes: Number formats. A quantized layer keeps as much as a frozen one in half precision.
        rows: Number of rows of the pass, and tokens of a row.
        eager: Whether the attention is eager, see ``computes_scores``; otherwise it keeps what flash-attention keeps.
        accumulated: Whether gradients of an earlier pass exist, to which those of this pass are added.
        details: What the layer's cross-attention gets, whose memory and gradients are then included.
        images: For the cross-attention, number of images of the pass.
    """
    short = copy.deepcopy(text)
    short.num_hidden_layers = 1
    with torch.device("meta"):
        decoder: Any = AutoModel.from_config(
            short, attn_implementation="eager" if eager else "sdpa", trust_remote_code=False
        )
        layer = _as_trained(decoder, tune)
        stack = None
        if details is not None:
            attach_cross_attention(decoder)
            stack = CrossAttentionStack(1, text.hidden_size, details.width, text.num_attention_heads, 0)
    with fake_tensors(), MemoryTracker() as tracker:
        replace_meta(decoder, dtypes.frozen, dtypes.trained)
        modules = [layer]
        if stack is not None:
            replace_meta(stack, dtypes.frozen, dtypes.trained)
            modules.append(stack)
        if accumulated:
            for parameter in chain.from_iterable(module.parameters() for module in modules):
                parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        stream = torch.zeros((*rows, text.hidden_size), dtype=dtypes.stream, requires_grad=True)
        empty = tracker.now
        arguments = _layer_arguments(decoder, layer, stream, eager=eager)
        if stack is not None and details is not None:
            arguments[DETAIL] = _detail(stack, details, images, stream)
        before = tracker.now
        with torch.autocast(
            "cpu", dtype=dtypes.autocast or torch.bfloat16, enabled=dtypes.autocast is not None, cache_enabled=False
        ):
            # The sum is released unless the layer keeps it, as the output of another layer is.
            output = layer(stream + 0.0, **arguments)
        output = output[0] if isinstance(output, tuple) else output
        # The output is the next layer's input, and is released before this layer's backward pass.
        outside = before + output.untyped_storage().nbytes()
        kept = tracker.now - outside
        tracker.reset_peak()
        output.backward(torch.empty_like(output))
        return LayerMemory(stream.untyped_storage().nbytes(), kept, tracker.peak - outside, before - empty)


def _detail(stack: CrossAttentionStack, details: DetailShape, images: int, stream: Tensor) -> Detail:
    """Return what the layer's cross-attention gets: the tokens are divided among the images."""
    tokens = stream.shape[0] * stream.shape[1]
    # The positions of the crops are trained, so that the features have a gradient.
    shape = (max(1, images * details.features), details.width)
    features = torch.zeros(shape, dtype=stream.dtype, requires_grad=True)
    edges = [tokens * number // images for number in range(images + 1)] if images else [0]
    segments = tuple(
        DetailSegment(start, stop, number, number + 1) for number, (start, stop) in enumerate(pairwise(edges))
    )
    ends = tuple(details.features * number for number in range(images + 1)) if images else (0, 1)
    return Detail(stack, features, ends, segments)


class _Reached(Exception):
    """Stops a decoder before its first layer."""


def _layer_arguments(decoder: Any, layer: nn.Module, stream: Tensor, *, eager: bool) -> dict[str, Any]:
    """Return the arguments, besides the hidden state, with which a decoder calls its first layer."""
    found: dict[str, Any] = {}

    def keep(*given: Any) -> None:
        found.update(given[-1])
        raise _Reached

    rows, tokens = stream.shape[:2]
    # A mask with four dimensions is used as given.
    shape = (rows, 1, tokens, tokens) if eager else (1, 1, 1, 1)
    mask = torch.zeros(shape, dtype=stream.dtype if eager else torch.bool)
    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        decoder(inputs_embeds=stream.detach(), attention_mask=mask, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    found.pop("hidden_states", None)
    # Without a mask, the attention is causal, as that of packed rows is.
    return found if eager else {**found, "attention_mask": None}


def _as_trained(decoder: Any, tune: Tune) -> nn.Module:
    """Return the layer of a decoder with only what a stage trains trainable, and with adapters."""
    layer: nn.Module = find_layers(decoder)[1][0]
    layer.requires_grad_(isinstance(tune, Full))
    layer.train()
    if isinstance(tune, Lora):
        from peft import inject_adapter_in_model

        # PiSSA's initialization needs the weights' values; its saved tensors are those of plain LoRA.
        plain = dataclasses.replace(tune, variant="lora") if tune.variant == "pissa" else tune
        settings = lora_config(plain, find_linear_layers(decoder), layers="layers")
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


def replace_meta(root: nn.Module, frozen: torch.dtype, trained: torch.dtype) -> None:
    """Replace a module's meta tensors by fake ones on the CPU.

    Args:
        root: The module.
        frozen: The number format of parameters that are not trained.
        trained: That of parameters that are trained.
    """
    for module in root.modules():
        holders = [module, *(child for child in module.children() if isinstance(child, nn.ParameterDict))]
        for holder in holders:
            for name, parameter in list(holder.named_parameters(recurse=False)):
                if parameter.is_meta:
                    data = torch.empty(parameter.shape, dtype=trained if parameter.requires_grad else frozen)
                    holder.register_parameter(name, nn.Parameter(data, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
