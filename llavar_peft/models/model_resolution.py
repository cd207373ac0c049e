"""Give a model that was read from disk the resolution that its settings ask for."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from llavar_peft.errors import ConfigError
from llavar_peft.models.cross_attention_hooks import check_decoder
from llavar_peft.models.detail_features import make_cross_attention
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.model_parts import ModelParts
from llavar_peft.recipe.resolution import CrossAttention, Tiles, describe_resolution
from llavar_peft.weights.io import tensor_names


def set_resolution(parts: ModelParts, resolution: Tiles | CrossAttention | None, *, seed: int) -> ModelParts:
    """Return a model's parts with a resolution, and new weights where it needs some that the model does not have.

    Args:
        parts: The model. Its own resolution is kept if no other is given.
        resolution: The resolution; None keeps the model's own.
        seed: Of the random weights.

    Raises:
        ConfigError: The tower's images are not square, or the model has another kind of resolution.
    """
    config = parts.config
    if resolution is not None:
        config = copy.deepcopy(config)
        config.resolution = describe_resolution(resolution)
        _check_change(parts, config)
    tensors = dict(parts.tensors)
    if config.tiles is None:
        tensors.pop(tensor_names.NEWLINE, None)
    elif tensor_names.NEWLINE not in tensors and resolution is not None:
        generator = torch.Generator().manual_seed(seed)
        width = config.text_config.hidden_size
        # As in LLaVA-NeXT.
        tensors[tensor_names.NEWLINE] = torch.randn(width, generator=generator) * width**-0.5
    if config.cross_attention is not None:
        check_decoder(config.text_config)
        if resolution is not None and not any(name.startswith(tensor_names.CROSS_ATTENTION) for name in tensors):
            tensors.update(_draw_cross_attention(config, seed))
    return dataclasses.replace(parts, config=config, tensors=tensors)


def _draw_cross_attention(config: LlavarConfig, seed: int) -> dict[str, torch.Tensor]:
    """Draw a cross-attention: Q and K as ``torch.nn.Linear`` is initialized, V zero and O the identity.

    Source: LLaVAR, appendix H.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in _cross_attention_shapes(config).items():
        kind = ".".join(name.split(".")[-2:])
        if kind in ("q_proj.weight", "k_proj.weight"):
            tensors[name] = (torch.rand(shape, generator=generator) * 2 - 1).mul_(shape[1] ** -0.5)
        elif kind == "o_proj.weight":
            tensors[name] = torch.eye(shape[0])
        else:
            tensors[name] = torch.ones(shape) if kind == "norm.weight" else torch.zeros(shape)
    return tensors


def _cross_attention_shapes(config: LlavarConfig) -> dict[str, torch.Size]:
    """Return the shape of each tensor by its name in the model."""
    with torch.device("meta"):
        stack: Any = make_cross_attention(config)
    return {f"{tensor_names.CROSS_ATTENTION}{name}": one.shape for name, one in stack.state_dict().items()}


def _check_change(parts: ModelParts, config: LlavarConfig) -> None:
    before, after = parts.config.resolution, config.resolution
    if before is None or after is None or before["type"] == after["type"]:
        return
    raise ConfigError.at(
        "model.resolution",
        f"another kind than the checkpoint's (got {after['type']}, expected {before['type']})",
        "leave it out, or start from a checkpoint without a resolution",
    )
