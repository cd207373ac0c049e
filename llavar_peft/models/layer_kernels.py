"""Faster kernels of the language model's layers: Liger's, or those that ``torch.compile`` makes.

Liger replaces RMSNorm, the MLP's product with its activation, and the rotation of queries and keys by one kernel each,
in models whose layers compute these as LLaMA's do. Its modules hold the model's own parameters and linear layers, so
that names, adapters, quantization and checkpoints stay as they are.

Compilation is regional, with dynamic shapes: in training all layers share the compiled function of a whole layer,
where the layers are like LLaMA's and not DeepSpeed's. Recomputation takes place around it. With the packed kernel of
``packed_attention`` a layer is a single function; where SDPA is called for each conversation, the attention itself
stays outside. A layer that has a key-value cache computes as it is, with compiled norms and MLPs, and so do other kinds
of layers: a decoded token would need a function for each layer, which is more than ``torch.compile`` keeps.

Source: liger-kernel (arXiv 2410.10989); PyTorch's tutorial on regional compilation.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import Cache

from llavar_peft.compat.dependency_internals import use_rotary_kernel
from llavar_peft.errors import ConfigError, EnvironmentFaultError, MissingDependencyError
from llavar_peft.models.decoder_structure import find_layers
from llavar_peft.models.launch_environment import uses_deepspeed
from llavar_peft.models.packed_attention import exclude_from_compilation
from llavar_peft.recipe.schema import Kernels

logger = logging.getLogger(__name__)


# Kinds of language models with LLaMA's norms, gated MLP with SiLU and rotation, whatever else is in their layers.
_LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3", "smollm3")


def check_kernels(kernels: Kernels, kind: str) -> None:
    """Check that a language model can have other kernels, before its weights are read.

    Args:
        kernels: The field of ``ModelConfig``.
        kind: The language model's ``model_type``.

    Raises:
        ConfigError: Liger's kernels compute something else than the model's layers.
        MissingDependencyError: liger-kernel is requested and not installed.
        EnvironmentFaultError: liger-kernel is requested and there is no GPU.
    """
    if kernels != "liger":
        return
    if kind not in _LIKE_LLAMA:
        raise ConfigError.at(
            "model.kernels",
            f"liger is not supported for this kind of language model (got {kind!r}, expected one of "
            f"{', '.join(_LIKE_LLAMA)})",
            "use 'compile', or 'none'",
        )
    if find_spec("liger_kernel") is None:
        raise MissingDependencyError.at(
            "model.kernels",
            "liger needs liger-kernel, which is not installed",
            "pip install 'llavar-peft[liger]', or use 'none'",
        )
    if not torch.cuda.is_available():
        raise EnvironmentFaultError.at(
            "model.kernels", "liger needs a GPU, and there is none", "use 'none', or 'compile'"
        )


def apply_kernels(model: Any, kernels: Kernels) -> None:
    """Switch a LLaVAR's language model to other kernels, in place.

    Args:
        model: A LLaVAR without adapters.
        kernels: The field of ``ModelConfig``.

    Raises:
        ConfigError: As ``check_kernels``.
        MissingDependencyError: liger-kernel is requested and not installed.
        EnvironmentFaultError: liger-kernel is requested and there is no GPU.
    """
    check_kernels(kernels, model.config.text_config.model_type)
    if kernels == "liger":
        _use_liger(model.get_decoder())
    elif kernels == "compile":
        _compile(model.get_decoder(), whole=_compiles_whole_layers(model.config))
    if kernels != "none":
        logger.info("kernels of the language model: %s", kernels)


def _compiles_whole_layers(config: Any) -> bool:
    """Whether layers are compiled as a whole.

    They are not with cross-attention, which is called within a layer and is another one in each; nor with DeepSpeed,
    which gathers the weights of each module inside of a layer. FSDP gathers those of a layer before it is called.
    """
    return config.text_config.model_type in _LIKE_LLAMA and config.cross_attention is None and not uses_deepspeed()


def _compile(decoder: Any, *, whole: bool) -> None:
    for part in _parts_to_compile(decoder):
        part.compile(dynamic=True)
    if whole:
        exclude_from_compilation()
        layers = find_layers(decoder)[1]
        compiled = _compiled_class(type(layers[0]))
        for layer in layers:
            layer.__class__ = compiled


def _compiled_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a class of layers that call one compiled function in training, and compute as they are with a cache.

    A class, because transformers wraps the ``forward`` of each class of layers to recompute what is inside.
    """
    plain = inspect.unwrap(kind.forward)
    compiled = torch.compile(plain, dynamic=True)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        has_cache = any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
        return (plain if has_cache else compiled)(self, *args, **kwargs)

    # Sharding finds layers by the name of their class.
    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _parts_to_compile(decoder: Any) -> Iterator[nn.Module]:
    """Yield the norms and MLPs of a decoder: of its layers everything but the attention."""
    for layer in find_layers(decoder)[1]:
        for part in layer.children():
            if "Attention" not in type(part).__name__ and any(True for _ in part.parameters()):
                yield part
    yield from (part for part in decoder.children() if "Norm" in type(part).__name__)


def _use_liger(decoder: Any) -> None:
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb

    with torch.device("meta"):  # the parameters made here are replaced
        for layer in decoder.layers:
            mlp = LigerSwiGLUMLP(decoder.config)
            mlp.gate_proj, mlp.up_proj, mlp.down_proj = layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
            layer.mlp = mlp.train(layer.training)
            layer.input_layernorm = _liger_norm(LigerRMSNorm, layer.input_layernorm)
            layer.post_attention_layernorm = _liger_norm(LigerRMSNorm, layer.post_attention_layernorm)
        decoder.norm = _liger_norm(LigerRMSNorm, decoder.norm)
    use_rotary_kernel(decoder, liger_rotary_pos_emb)


def _liger_norm(kind: type[nn.Module], norm: Any) -> nn.Module:
    """Return a module of Liger's with the weight of a plain one."""
    made = kind(len(norm.weight), eps=norm.variance_epsilon)
    made.weight = norm.weight
    return made.train(norm.training)
