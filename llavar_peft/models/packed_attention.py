"""Packed rows: several conversations in one row, each attending only to itself, so that a batch has no padding.

The attention of packed rows, by what the language model is set to and where it runs:

=====================  ==================================  ========================================================
attention              used on                             kernels
=====================  ==================================  ========================================================
``flash_attention_2``  GPUs, in half precision             one call of flash-attention (``cu_seq_lens``)
``sdpa``               CUDA from compute capability 8.0,   one call of ``torch.nn.attention.varlen.varlen_attn``:
                       half precision, torch >= 2.11       PyTorch's own build of flash-attention
``sdpa``               everything else                     one call of SDPA per conversation
``eager``              models with soft-capped scores      plain matrix products per conversation
=====================  ==================================  ========================================================

A dense block-diagonal mask would cost time and memory quadratic in the row's length. ``flex_attention`` is not used:
its block mask has to be built for each batch, and without compilation it computes all of the quadratic attention.

Source: arXiv 2407.09105 (packing with position ids); transformers, integrations/sdpa_attention.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from llavar_peft.compat.dependency_internals import attention_implementation, supports_sdpa
from llavar_peft.models.packing_probe import keeps_segments_apart

logger = logging.getLogger(__name__)

_PACKED = "within_segments"  # without "sdpa", or transformers takes it for its own
_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256
"""The largest width of a head that flash-attention supports; it must also be a multiple of 8."""


@dataclass(frozen=True)
class Segments:
    """The lengths of a packed row's conversations.

    A compiled layer depends on the numbers in a tuple among its arguments, but not on those in an object that it does
    not look into, as with a kernel for all segments, or where the attention is excluded from compilation.
    """

    lengths: tuple[int, ...]


def enable_packing(model: Any) -> bool:
    """Switch a LLaVAR's language model to attention that supports packed rows; padded rows keep working.

    Args:
        model: A LLaVAR, or a ``PeftModel`` around one; changed in place until ``disable_packing``.

    Returns:
        Whether packed rows are supported. With eager attention they are not, unless it caps the scores; nor by language
        models that compute their attention by functions of their own, or that mix positions in other ways.
    """
    text = model.config.text_config
    current = attention_implementation(text)
    if current == _PACKED:
        return True
    if not keeps_segments_apart(text):
        return False
    if current == "sdpa" or (current == "eager" and caps_scores(text)):
        AttentionInterface.register(_PACKED, _sdpa_within_segments)
        AttentionMaskInterface.register(_PACKED, sdpa_mask)
        model.get_decoder().set_attn_implementation(_PACKED)
    return attention_implementation(model.config.text_config).startswith(("flash", _PACKED))


def disable_packing(model: Any) -> None:
    """Undo ``enable_packing``."""
    if attention_implementation(model.config.text_config) == _PACKED:
        model.get_decoder().set_attn_implementation(torch_attention(model.config.text_config))


def caps_scores(text_config: Any) -> bool:
    """Return whether a language model caps its attention scores (Gemma 2), which SDPA cannot do."""
    return bool(getattr(text_config, "attn_logit_softcapping", None))


def torch_attention(text_config: Any) -> str:
    """Return the attention of a language model that needs no package: ``"sdpa"``, or ``"eager"`` where SDPA cannot."""
    return "eager" if caps_scores(text_config) or not supports_sdpa(text_config) else "sdpa"


def replace_flash_attention(model: Any) -> bool:
    """Switch a LLaVAR from flash-attention to PyTorch's, for a computation in float32, which flash-attention rejects.

    Returns:
        Whether the model used flash-attention.
    """
    configs = (model.config.text_config, model.config.vision_config)
    uses_flash = any(attention_implementation(config).startswith("flash") for config in configs)
    if uses_flash:
        text = torch_attention(model.config.text_config)
        model.set_attn_implementation({"": "sdpa", "text_config": text, "vision_config": "sdpa"})
    return uses_flash


def packed_arguments(lengths: tuple[int, ...], model: Any, device: torch.device) -> dict[str, Any]:
    """Return the arguments with which a model's ``forward`` takes a packed row.

    Args:
        lengths: Lengths of the conversations in the row, from left to right; their sum is the row's length.
        model: After ``enable_packing``; its configuration states which attention it uses.
        device: The row's device.

    Returns:
        ``position_ids`` ``[1, T]``, which restart with each conversation, and the attention's own arguments.
    """
    text = model.config.text_config
    # Made on the CPU and copied once: the device is neither waited for nor given an operation per conversation.
    positions = torch.tensor([list(chain.from_iterable(map(range, lengths)))]).to(device, non_blocking=True)
    if attention_implementation(text) != _PACKED:
        return {"position_ids": positions, **_kernel_arguments(lengths, device)}
    # A mask with four dimensions is used as given; otherwise one of the row's length squared would be built.
    unused_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    arguments = {"position_ids": positions, "segments": Segments(lengths), "attention_mask": unused_mask}
    suits_kernel = _fits_kernel(_head_width(text), getattr(text, "attention_dropout", 0.0)) and not caps_scores(text)
    uses_kernel = suits_kernel and _has_kernel(device)
    _log_choice(device.type, uses_kernel)
    return {**arguments, **_kernel_arguments(lengths, device)} if uses_kernel else arguments


def _kernel_arguments(lengths: tuple[int, ...], device: torch.device) -> dict[str, Any]:
    """Return where the conversations end and how long the longest is, under flash-attention's names."""
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
    return {
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends),
        **dict.fromkeys(("max_length_q", "max_length_k"), max(lengths)),
    }


def padded_arguments(attention_mask_BT: Tensor, model: Any) -> dict[str, Any]:
    """Return the mask with which a model's ``forward`` takes rows that are padded on the right.

    Given a mask of two dimensions, transformers asks the device in each pass whether there is any padding, and waits
    for the answer. A mask of four dimensions is used as given. On a CPU, where nothing waits, transformers may ask.

    Args:
        attention_mask_BT: 0 at padding.
        model: Its configuration states which attention it uses; only SDPA takes such a mask.
    """
    text, width = model.config.text_config, attention_mask_BT.shape[1]
    has_window = (getattr(text, "sliding_window", None) or width) < width
    if attention_mask_BT.device.type == "cpu" or attention_implementation(text) not in ("sdpa", _PACKED) or has_window:
        return {"attention_mask": attention_mask_BT}
    causal_TT = torch.ones(width, width, dtype=torch.bool, device=attention_mask_BT.device).tril()
    return {"attention_mask": causal_TT & attention_mask_BT.bool()[:, None, None, :]}


def _head_width(text: Any) -> int:
    """Return the width of a head; 0 where it differs between the layers (Gemma 4)."""
    try:
        return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    except RuntimeError:
        return 0


def _fits_kernel(head_width: int, dropout: float) -> bool:
    """Return whether flash-attention supports heads of this width, and this share of dropped weights."""
    return head_width % 8 == 0 and 0 < head_width <= _LARGEST_HEAD and dropout == 0


@cache
def _has_kernel(device: torch.device) -> bool:
    """Return whether ``varlen_attn`` runs on a device. Its causal mask and scale exist since torch 2.11."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.backends.cuda.is_flash_attention_available():
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    has_arguments = {"scale", "window_size"} <= set(signature(varlen_attn).parameters)
    return has_arguments and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _log_choice(device: str, uses_kernel: bool) -> None:
    """Log which implementation packed rows use on a device, once."""
    implementation = "by varlen_attn in half precision, otherwise by SDPA" if uses_kernel else "by SDPA"
    logger.info("packed rows on %s: attention within each conversation, %s", device, implementation)


def _sdpa_within_segments(  # noqa: PLR0913 - the arguments of an attention function
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute SDPA, within each segment if there are any.

    Shapes: ``query`` [B, H, T, D], ``key`` and ``value`` [B, K, T, D]; the result is [B, T, H, D].
    """
    attend: Callable[..., tuple[Tensor, Any]] = (
        sdpa_attention_forward if softcap is None else partial(_capped_attention, softcap=softcap)
    )
    if segments is None:
        output: Tensor = attend(module, query, key, value, attention_mask, **kwargs)[0]
        return output, None
    if cu_seq_lens_q is not None and (dtype := _compute_dtype(query)) in _KERNEL_DTYPES:
        rows = [tensor.squeeze(0).transpose(0, 1).to(dtype) for tensor in (query, key, value)]
        scale, window = kwargs.get("scaling"), sliding_window
        return _varlen(rows, cu_seq_lens_q, max_length_q, scale=scale, window=window)[None], None
    return _attend_each(attend, module, (query, key, value), segments.lengths, sliding_window, **kwargs), None


def _attend_each(
    attend: Callable[..., tuple[Tensor, Any]],
    module: torch.nn.Module,
    tensors: Sequence[Tensor],
    lengths: tuple[int, ...],
    window: int | None,
    **kwargs: Any,
) -> Tensor:
    """Compute attention within each segment by a call of its own; query, key and value are those of the row."""
    outputs: list[Tensor] = []
    queries, keys, values = (torch.split(tensor, list(lengths), dim=2) for tensor in tensors)
    for query, key, value in zip(queries, keys, values, strict=True):
        outputs.append(attend(module, query, key, value, _window_mask(query, window), **kwargs)[0])
    return torch.cat(outputs, dim=1)


def exclude_from_compilation() -> None:
    """Let ``torch.compile`` leave out the attention by segment, which it would compile for each number of segments."""
    global _attend_each  # noqa: PLW0603 - importing the compiler takes a second, which other runs must not pay
    disable: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = torch.compiler.disable
    _attend_each = disable(_attend_each)


def _capped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    softcap: float,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention with capped scores, as transformers' eager attention does; None is a causal mask.

    Shapes: as in ``_sdpa_within_segments``; ``mask`` is true where a position is attended to.
    """
    groups, (rows, columns) = query.shape[1] // key.shape[1], (query.shape[2], key.shape[2])
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scaling / softcap)
    if mask is None:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _window_mask(query: Tensor, window: int | None) -> Tensor | None:
    """Return the mask ``[1, 1, T, T]`` of a causal attention to a window, or None where the window holds everything."""
    width = query.shape[2]
    if window is None or width <= window:
        return None
    causal_TT = torch.ones(width, width, dtype=torch.bool, device=query.device).tril()
    return (causal_TT & ~causal_TT.tril(-window))[None, None]


def _compute_dtype(query: Tensor) -> torch.dtype:
    """Return the dtype that SDPA computes in; queries and keys are float32 where the hidden states are."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def _varlen(
    rows: Sequence[Tensor], ends: Tensor, longest: int, *, scale: float | None, window: int | None = None
) -> Tensor:
    """Compute causal attention within the segments of one row by one kernel.

    Args:
        rows: Queries ``[T, H, D]``, keys and values ``[T, K, D]``.
        ends: Where the segments end, after a 0.
        longest: Length of the longest segment.
        scale: Factor of the scores; None is one over the square root of D.
        window: Number of positions that each position attends to, itself included; None is all before it.

    Returns:
        The result ``[T, H, D]``.
    """
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = rows
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    output: Any = varlen_attn(
        query,
        key,
        value,
        ends,
        ends,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
    )
    attended: Tensor = output
    return attended
