"""Private parts of transformers, PyTorch, accelerate, DeepSpeed and bitsandbytes, one function for each.

The libraries are imported where they are used, so that no part of this package pays for the import of another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import MethodType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn
    from transformers import PretrainedConfig

_PARTITIONS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
"""Attributes of DeepSpeed's ZeRO optimizers: of stage 3, and of stages 1 and 2."""


def attention_implementation(config: PretrainedConfig) -> str:
    """Return the name of the attention implementation that a model with this configuration uses.

    Replaces: nothing public. ``PreTrainedModel.set_attn_implementation`` sets it and has no counterpart that reads it;
    transformers' guide to custom attention reads the same attribute. Since: transformers 4.36, last seen in 5.24.
    """
    return str(config._attn_implementation)


def fake_tensors() -> AbstractContextManager[object]:
    """Return a context in which new tensors have a device, a dtype and a shape, but no memory.

    Replaces ``torch.device("meta")``, which does not suffice: autocast does not support the device type ``meta``.
    PyTorch documents fake tensors but exports them under no public name. Needed since torch 2.0; checked with 2.13.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def enable_fsdp_on_cpu(accelerator: Accelerator) -> None:
    """Switch an accelerator of several CPU processes from DDP to the FSDP of its environment variables.

    Replaces the choice in ``AcceleratorState.__init__``, which considers FSDP only where each process has a GPU or
    another accelerator, and ignores a plugin passed to ``Accelerator``. Needed since accelerate 1.0.
    """
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    # Both states: every new AcceleratorState copies that of the process.
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def fp32_partitions(optimizer: Any) -> list[Tensor]:
    """Return the flat float32 partitions that this rank's ZeRO optimizer updates.

    Replaces ``deepspeed.utils.safe_get_local_fp32_param`` and its relatives: they work for one parameter at a time,
    for stage 3 only, and cannot set a state that is not a tensor of the parameter's shape (Adam's ``step``), so that a
    resumed run would not be exact. The attributes exist since DeepSpeed 0.9.

    Args:
        optimizer: DeepSpeed's optimizer, which wraps a ``torch.optim.Optimizer``.

    Returns:
        The partitions in the order of the parameter groups; an empty list where DeepSpeed keeps them elsewhere, as it
        does without ZeRO and with offload to disk.
    """
    for attribute in _PARTITIONS:
        found: list[Tensor] = list(getattr(optimizer, attribute, None) or ())
        if found and all(partition.numel() for partition in found):
            return found
    return []


def keep_quantization_scales(model: nn.Module) -> None:
    """Keep the stored numbers and scales of quantized layers unchanged while the layers are used.

    Replaces: nothing public; bitsandbytes has no option for either behavior. Since: bitsandbytes 0.49, last seen in
    0.50.2.

    ``Linear4bit.support_avx512bf16_for_cpu``: on a CPU with AVX512-BF16, a layer in ``eval`` mode rewrites its weight
    for another kernel and rounds the scales to bfloat16. A run that generates between its steps would not be
    reproducible, and an adapter could not be merged onto the same numbers again.

    ``Int8Params.CB`` and ``SCB``: a weight on the CPU that is moved to the CPU counts as a new weight, whose scales
    ``Linear8bitLt`` expects in ``weight.SCB``, while those of a layer in use are in ``state.SCB``. peft's DoRA moves
    the weight in each forward pass (peft 0.21.2, ``peft/utils/integrations.py``, ``dequantize_module_weight``).
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    def keep_state(layer: Any, _: Any) -> None:
        if layer.weight.CB is not None and layer.weight.SCB is None and layer.state.SCB is not None:
            layer.state.CB, layer.weight.CB = layer.weight.CB, None

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.register_forward_pre_hook(keep_state)
        elif isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def embed_used_rows_only(model: nn.Module) -> None:
    """Let peft's trained embedding rows be used without a copy of the whole embedding at each call.

    Replaces ``TrainableTokensLayer.forward_adapters``, which writes the rows into a copy of the embedding: 328 MB at
    32,003 x 5,120 in bfloat16, at each token that is decoded, and in training a gradient of the same size. Here the
    rows are chosen for the ids at which they are used. The same numbers result, and the parameters stay peft's. Needed
    since peft 0.15, last seen in 0.21.

    Args:
        model: A ``PeftModel``; changed in place. Layers that are not embeddings, and rows that are not consecutive,
            stay as they are.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            module.forward_adapters = MethodType(_embed_used_rows, module)


def _embed_used_rows(
    layer: Any, input_ids: Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any
) -> Tensor:
    import torch

    rows = [layer.token_indices[name] for name in active_adapters]
    plain = type(layer.base_layer) is torch.nn.Embedding and not (layer.merged or layer.disable_adapters)
    if not plain or len(rows) != 1 or list(rows[0]) != list(range(rows[0][0], rows[0][0] + len(rows[0]))):
        whole: Tensor = type(layer).forward_adapters(layer, input_ids, active_adapters, *args, **kwargs)
        return whole
    embeds: Tensor = layer.base_layer(input_ids)
    index = input_ids - rows[0][0]
    weight = layer.trainable_tokens_delta[active_adapters[0]]
    trained = torch.nn.functional.embedding(index.clamp(0, len(weight) - 1), weight).to(embeds.dtype)
    return torch.where(((index >= 0) & (index < len(weight)))[..., None], trained, embeds)


def keeps_state(config: PretrainedConfig) -> bool:
    """Return whether a language model keeps more of a text than keys and values, such as Mamba's state.

    Replaces: nothing public. transformers marks classes that cannot go back in a text; others, whose layers are of
    several kinds, are recognized by the cache that is made for them. Since: transformers 4.40, last seen in 5.24.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_is_stateful", False):
        return True
    try:
        kinds = {type(layer) for layer in DynamicCache(config=config).layers}
    except KeyError:  # layers of a kind that the cache does not know
        return True
    return not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def supports_sdpa(config: PretrainedConfig) -> bool:
    """Return whether transformers computes a language model's attention by PyTorch's SDPA.

    Replaces: nothing public. ``from_pretrained`` raises a ValueError where it is asked for SDPA and this is false.
    Since: transformers 4.36, last seen in 5.24.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return bool(getattr(kind, "_supports_sdpa", True))


def use_rotary_kernel(decoder: nn.Module, kernel: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Rotate queries and keys of a kind of decoder on a GPU by another function; on a CPU the plain one stays in use.

    Replaces: nothing public. ``LlamaAttention.forward`` calls a function of its module, which libraries of kernels
    (liger-kernel, ``apply_liger_kernel_to_llama``) replace; transformers' own mechanism needs the package ``kernels``
    and the hub. It holds for all decoders of this kind in the process. Since: transformers 4.31, last seen in 5.24.

    Args:
        decoder: A decoder of the kind, such as a ``LlamaModel``.
        kernel: Takes queries ``[B, H, T, D]``, keys, cosines and sines ``[B, T, D]``.
    """
    modeling: Any = sys.modules[type(decoder).__module__]
    current: Any = modeling.apply_rotary_pos_emb
    plain = getattr(current, "plain", current)  # set below, by an earlier call

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        chosen = kernel if q.is_cuda and not options else plain
        rotated: tuple[Tensor, Tensor] = chosen(q, k, cos, sin, **options)
        return rotated

    rotate.plain = plain  # type: ignore[attr-defined]
    modeling.apply_rotary_pos_emb = rotate


def release_int8_inputs(model: nn.Module) -> None:
    """Do not keep the inputs of frozen 8-bit layers for a backward pass that does not read them.

    Replaces: nothing public. bitsandbytes keeps a layer's input as an attribute of autograd's context instead of by
    ``save_for_backward``, so that activation checkpointing does not see it: each layer keeps its inputs although it is
    recomputed (13B, 8,192 tokens: 19 GB). Only the gradient of the weight would need them, and a weight in 8 bits has
    none. Since: bitsandbytes 0.41, last seen in 0.50.2.

    ``MatMul8bitLt`` (CUDA) sets ``ctx.tensors``, ``MatMul8bitFp`` (CPU and XPU) ``ctx.A``; the context is the
    ``grad_fn`` of the output.
    """
    from bitsandbytes.nn import Linear8bitLt

    def release(layer: Any, _: Any, output: Tensor) -> None:
        node: Any = output.grad_fn
        if node is None or layer.weight.requires_grad or getattr(node, "is_empty", False):
            return
        if getattr(node, "tensors", None) is not None:
            node.tensors = (None, None, None)
        if getattr(node, "A", None) is not None:
            node.A = None

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.register_forward_hook(release)
