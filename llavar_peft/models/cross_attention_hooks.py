"""How the layers of a language model call their cross-attention, and which language models allow it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModel

from llavar_peft.errors import ConfigError
from llavar_peft.models.cross_attention import CrossAttentionStack, Detail, DetailSegment

DETAIL: Final = "detail"
"""The argument of the decoder layers, and of their self-attention, that carries a ``Detail``."""


def attach_cross_attention(language_model: Any) -> None:
    """Let the layers of a language model call the cross-attention of the ``Detail`` that they are given."""
    for layer in language_model.layers:
        attention = getattr(layer, "self_attn", None)
        if isinstance(attention, nn.Module):
            layer.register_forward_pre_hook(_keep_residual, with_kwargs=True)
            attention.register_forward_hook(_add_cross_attention, with_kwargs=True)


def _keep_residual(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    detail = kwargs.get(DETAIL)
    if detail is None:
        return None
    hidden_BTD = args[0] if args else kwargs["hidden_states"]
    return args, {**kwargs, DETAIL: replace(detail, residual_BTD=hidden_BTD)}


def _add_cross_attention(module: Any, _: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    detail = kwargs.get(DETAIL)
    if detail is None:
        return None
    attended_BTD, *rest = output if isinstance(output, tuple) else (output,)
    layer = detail.modules.layers[module.layer_idx]
    attended_BTD = attended_BTD + layer(detail.residual_BTD + attended_BTD, detail.features_FC, detail)
    return (attended_BTD, *rest) if isinstance(output, tuple) else attended_BTD


class _Sums(TorchFunctionMode):
    """Keeps the pairs of tensors that are added."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Any, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("add", "add_") and len(args) == 2:
            self.pairs.append(args)
        return func(*args, **(kwargs or {}))


def check_decoder(text_config: Any) -> None:
    """Reject a language model whose layers do not add the output of their self-attention to their input as it is.

    The model is called without memory to find out.

    Raises:
        ConfigError: Cross-attention cannot be added to this language model.
    """
    if not _adds_attention(text_config):
        raise ConfigError.at(
            "model.resolution",
            f"cross-attention cannot be added to this language model (got {text_config.model_type}, expected layers "
            "that add the output of their self-attention to their input as it is)",
            "use resolution: {type: tiles}, which every language model supports; or LLaMA, Mistral, Qwen or Phi-3",
        )


def _adds_attention(text_config: Any) -> bool:
    found: dict[int, tuple[Any, Any]] = {}

    def watch(module: Any, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        if DETAIL in kwargs:
            found[module.layer_idx] = (kwargs[DETAIL].residual_BTD, output[0] if isinstance(output, tuple) else output)

    with torch.device("meta"), torch.no_grad():
        skeleton: Any = AutoModel.from_config(text_config, trust_remote_code=False).eval()
        skeleton.set_attn_implementation("eager")  # flash-attention computes on GPUs only
        layers = list(getattr(skeleton, "layers", ()))
        if not layers or not all(hasattr(layer, "self_attn") for layer in layers):
            return False
        attach_cross_attention(skeleton)
        for layer in layers:
            layer.self_attn.register_forward_hook(watch, with_kwargs=True)
        stack = CrossAttentionStack(len(layers), text_config.hidden_size, 1, 1, 0).to(skeleton.dtype)
        detail = Detail(stack, torch.zeros(1, 1), (0, 1), (DetailSegment(0, 2, 0, 1),))
        embeds = torch.zeros(1, 2, text_config.hidden_size, dtype=skeleton.dtype)
        # A mask with four dimensions is used as given, while other ones are looked into.
        mask = torch.zeros(1, 1, 2, 2, dtype=skeleton.dtype)
        # What follows the attention cannot always be called without memory (experts), nor attentions of other kinds.
        with suppress(Exception), _Sums() as sums:
            skeleton(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **{DETAIL: detail})
    return bool(found) and all(any(one is a and two is b for a, b in sums.pairs) for one, two in found.values())
