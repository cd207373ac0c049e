"""Faster kernels of the language model's layers: Liger's, or those that ``torch.compile`` makes.

Liger replaces RMSNorm, the MLP's product with its activation, and the rotation of queries and keys by one kernel each.
Its modules hold the model's own parameters and linear layers, so that names, adapters, quantization and checkpoints
stay as they are.

Compilation is regional, with dynamic shapes: all layers share the compiled function of their MLPs and that of their
norms. A layer as a whole is not compiled, because its attention works on the key-value cache: a decoded token would
need a function for each layer, which is more than ``torch.compile`` keeps, and the layers of a packed row would depend
on the number of its conversations where each is computed by itself.

Source: liger-kernel (arXiv 2410.10989); PyTorch's tutorial on regional compilation.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch

from llavar_peft.compat.dependency_internals import use_rotary_kernel
from llavar_peft.errors import EnvironmentFaultError, MissingDependencyError
from llavar_peft.recipe.schema import Kernels

logger = logging.getLogger(__name__)


def apply_kernels(model: Any, kernels: Kernels) -> None:
    """Switch a LLaVAR's language model to other kernels, in place.

    Args:
        model: A LLaVAR without adapters.
        kernels: The field of ``ModelConfig``.

    Raises:
        MissingDependencyError: liger-kernel is requested and not installed.
        EnvironmentFaultError: liger-kernel is requested and there is no GPU.
    """
    if kernels == "liger":
        _use_liger(model)
    elif kernels == "compile":
        decoder = model.get_decoder()
        for layer in decoder.layers:
            for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
                part.compile(dynamic=True)
        decoder.norm.compile(dynamic=True)
    if kernels != "none":
        logger.info("kernels of the language model: %s", kernels)


def _use_liger(model: Any) -> None:
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
    from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, liger_rotary_pos_emb

    decoder = model.get_decoder()
    with torch.device("meta"):  # the parameters made here are replaced
        for layer in decoder.layers:
            mlp = LigerSwiGLUMLP(decoder.config)
            mlp.gate_proj, mlp.up_proj, mlp.down_proj = layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj
            layer.mlp = mlp.train(layer.training)
            layer.input_layernorm = _liger_norm(LigerRMSNorm, layer.input_layernorm)
            layer.post_attention_layernorm = _liger_norm(LigerRMSNorm, layer.post_attention_layernorm)
        decoder.norm = _liger_norm(LigerRMSNorm, decoder.norm)
    use_rotary_kernel(liger_rotary_pos_emb)


def _liger_norm(kind: type[torch.nn.Module], norm: Any) -> torch.nn.Module:
    """Return a module of Liger's with the weight of a plain one."""
    made = kind(len(norm.weight), eps=norm.variance_epsilon)
    made.weight = norm.weight
    return made.train(norm.training)
