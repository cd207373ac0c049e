"""Packed rows: several conversations in one row, each attending only to itself, so that a batch has no padding.

flash-attention supports such rows directly (``cu_seq_lens``). With SDPA, attention is computed once per conversation,
causally and without a mask: a dense block-diagonal mask would cost time and memory quadratic in the row's length.

Source: arXiv 2407.09105 (packing with position ids); transformers, integrations/sdpa_attention.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from llavar_peft.compat.dependency_internals import attention_implementation

_PACKED_SDPA = "sdpa_within_segments"


def enable_packing(model: Any) -> bool:
    """Switch a LLaVAR's language model to attention that supports packed rows; padded rows keep working.

    Args:
        model: A LLaVAR, or a ``PeftModel`` around one; changed in place until ``disable_packing``.

    Returns:
        Whether packed rows are supported. With eager attention they are not.
    """
    if attention_implementation(model.config.text_config) == "sdpa":
        AttentionInterface.register(_PACKED_SDPA, _sdpa_within_segments)
        AttentionMaskInterface.register(_PACKED_SDPA, sdpa_mask)
        model.get_decoder().set_attn_implementation(_PACKED_SDPA)
    return attention_implementation(model.config.text_config).startswith(("flash", _PACKED_SDPA))


def disable_packing(model: Any) -> None:
    """Undo ``enable_packing``."""
    if attention_implementation(model.config.text_config) == _PACKED_SDPA:
        model.get_decoder().set_attn_implementation("sdpa")


def packed_arguments(lengths: tuple[int, ...], model: Any, device: torch.device) -> dict[str, Any]:
    """Return the arguments with which a model's ``forward`` takes a packed row.

    Args:
        lengths: Lengths of the conversations in the row, from left to right; their sum is the row's length.
        model: After ``enable_packing``; its configuration states which attention it uses.
        device: The row's device.

    Returns:
        ``position_ids`` ``[1, T]``, which restart with each conversation, and the attention's own arguments.
    """
    position_ids = torch.cat([torch.arange(length, device=device) for length in lengths])[None]
    if attention_implementation(model.config.text_config) == _PACKED_SDPA:
        # A mask with four dimensions is used as given; otherwise one of the row's length squared would be built.
        unused_mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
        return {"position_ids": position_ids, "segments": lengths, "attention_mask": unused_mask}
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device, non_blocking=True)
    longest = max(lengths)
    return {
        "position_ids": position_ids,
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), ends),
        **dict.fromkeys(("max_length_q", "max_length_k"), longest),
    }


def padded_arguments(attention_mask_BT: Tensor, model: Any) -> dict[str, Any]:
    """Return the mask with which a model's ``forward`` takes rows that are padded on the right.

    Given a mask of two dimensions, transformers asks the device in each pass whether there is any padding, and waits
    for the answer. A mask of four dimensions is used as given. On a CPU, where nothing waits, transformers may ask.

    Args:
        attention_mask_BT: 0 at padding.
        model: Its configuration states which attention it uses; only SDPA takes such a mask.
    """
    if attention_mask_BT.device.type == "cpu" or "sdpa" not in attention_implementation(model.config.text_config):
        return {"attention_mask": attention_mask_BT}
    width = attention_mask_BT.shape[1]
    causal_TT = torch.ones(width, width, dtype=torch.bool, device=attention_mask_BT.device).tril()
    return {"attention_mask": causal_TT & attention_mask_BT.bool()[:, None, None, :]}


def _sdpa_within_segments(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute SDPA, within each segment if there are any.

    Shapes: ``query`` [B, H, T, D], ``key`` and ``value`` [B, K, T, D]; the result is [B, T, H, D].
    """
    if segments is None:
        output: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
        return output, None
    split = zip(*(torch.split(tensor, list(segments), dim=2) for tensor in (query, key, value)), strict=True)
    outputs: list[Tensor] = [sdpa_attention_forward(module, *segment, None, **kwargs)[0] for segment in split]
    return torch.cat(outputs, dim=1), None
