"""Conversations laid end to end in one row, each attending to itself alone: a batch without padding.

flash-attention takes such rows as they are (``cu_seq_lens``). Elsewhere SDPA is called once for each conversation,
causally and without a mask: a dense block-diagonal mask would cost time and memory by the square of the row.

Source: arXiv 2407.09105 (packing with position ids); transformers, integrations/sdpa_attention.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

_PACKED_SDPA = "sdpa_within_segments"


def enable_packing(model: Any) -> bool:
    """Make a LLaVAR's language model able to take packed rows; anything else it goes on taking.

    Args:
        model: A LLaVAR; it is changed in place until ``disable_packing``.

    Returns:
        Whether it can. With eager attention it cannot.
    """
    config = model.config.text_config
    if config._attn_implementation == "sdpa":
        AttentionInterface.register(_PACKED_SDPA, _attend)
        AttentionMaskInterface.register(_PACKED_SDPA, sdpa_mask)
        config._attn_implementation = _PACKED_SDPA
    return str(config._attn_implementation).startswith(("flash", _PACKED_SDPA))


def disable_packing(model: Any) -> None:
    """Undoes ``enable_packing``."""
    config = model.config.text_config
    if config._attn_implementation == _PACKED_SDPA:
        config._attn_implementation = "sdpa"


def packed_arguments(lengths: tuple[int, ...], model: Any, device: torch.device) -> dict[str, Any]:
    """What a model's ``forward`` has to be told of a packed row.

    Args:
        lengths: Of the conversations in the row, from left to right; they fill it.
        model: After ``enable_packing``; its configuration says which attention it has.
        device: Where the row is.

    Returns:
        ``position_ids`` ``[1, T]``, which restart with each conversation, and what the attention takes.
    """
    position_ids = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    if model.config.text_config._attn_implementation == _PACKED_SDPA:
        # A mask of four dimensions is taken as it is; the one made otherwise has the row's length squared.
        nothing = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
        return {"position_ids": position_ids, "segments": lengths, "attention_mask": nothing}
    ends = torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    longest = max(lengths)
    return {
        "position_ids": position_ids,
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends),
        **dict.fromkeys(("max_length_q", "max_length_k"), longest),
    }


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA, within each segment where there are any.

    Shapes: ``query`` [B, H, T, D], ``key`` and ``value`` [B, K, T, D]; the result is [B, T, H, D].
    """
    if segments is None:
        whole: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
        return whole, None
    divided = zip(*(torch.split(tensor, list(segments), dim=2) for tensor in (query, key, value)), strict=True)
    outputs: list[Tensor] = [sdpa_attention_forward(module, *one, None, **kwargs)[0] for one in divided]
    return torch.cat(outputs, dim=1), None
