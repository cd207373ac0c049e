"""flash-attention's kernels in PyTorch, so that the code around them, transformers' and torch's own, runs on a CPU.

The kernels check what CUDA would not report: they raise where a segment reads beyond its input, and fill what no
segment covers with NaN, where flash-attention leaves what was in memory. Private parts of transformers and torch are
used to put them in; the code that calls them is the libraries' own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash_utils

HALF = (torch.float16, torch.bfloat16)


@dataclass
class KernelCalls:
    """Calls of the kernels: the shape of the queries, the segments' ends (None: whole rows), the causal flag.

    ``limits`` are the number of positions before its own that each one attends to (-1: all), and the cap of the scores.
    """

    shapes: list[tuple[int, ...]] = field(default_factory=list)
    ends: list[list[int] | None] = field(default_factory=list)
    causal: list[bool] = field(default_factory=list)
    limits: list[tuple[int, float]] = field(default_factory=list)

    def add(self, query: Tensor, ends: list[int] | None, causal: bool, *, left: int = -1, softcap: float = 0.0) -> None:
        self.shapes.append(tuple(query.shape))
        self.ends.append(ends)
        self.causal.append(causal)
        self.limits.append((left, softcap))

    def of(self, *, causal: bool) -> list[list[int] | None]:
        """Return the ends of the calls by the language model (causal) or by the tower."""
        return [ends for ends, flag in zip(self.ends, self.causal, strict=True) if flag == causal]


def probabilities(
    query: Tensor, key: Tensor, *, causal: bool, scale: float, left: int = -1, softcap: float = 0.0
) -> Tensor:
    """Attention's probabilities ``[H, Q, K]`` in float32; a causal mask is aligned at the lower right corner."""
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        seen, offset = torch.ones(scores.shape[1:], dtype=torch.bool), scores.shape[2] - scores.shape[1]
        hidden = seen.triu(1 + offset) | (seen.tril(offset - left - 1) if left >= 0 else ~seen)
        scores = scores.masked_fill(hidden, float("-inf"))
    return scores.softmax(dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float | None, **limits: Any) -> Tensor:
    """Attention of one segment, ``[T, H, D]``; keys and values may have fewer heads."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    weights = probabilities(query, key, causal=causal, scale=scale or 1 / math.sqrt(query.shape[-1]), **limits)
    return torch.einsum("hqk,khd->qhd", weights, value.float()).to(query.dtype)


def attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float | None, left: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``attend`` of one segment, with as many heads of keys as of queries."""
    scale = scale or 1 / math.sqrt(query.shape[-1])
    weights = probabilities(query, key, causal=causal, scale=scale, left=left)
    by_weights = torch.einsum("qhd,khd->hqk", gradient.float(), value.float())
    by_scores = weights * (by_weights - (weights * by_weights).sum(dim=-1, keepdim=True)) * scale
    by_query = torch.einsum("hqk,khd->qhd", by_scores, key.float())
    by_key = torch.einsum("hqk,qhd->khd", by_scores, query.float())
    by_value = torch.einsum("hqk,qhd->khd", weights, gradient.float())
    return by_query.to(query.dtype), by_key.to(key.dtype), by_value.to(value.dtype)


def attend_segments(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, key_ends: Tensor, longest: tuple[Any, Any], **options: Any
) -> Tensor:
    """Attention within segments, with the checks of the module's docstring."""
    assert ends.dtype == key_ends.dtype == torch.int32
    places, key_places = ends.tolist(), key_ends.tolist()
    assert len(places) == len(key_places)
    output = torch.full_like(query, float("nan"))
    for start, end, key_start, key_end in zip(places, places[1:], key_places, key_places[1:], strict=False):
        if end > len(query) or key_end > len(key):
            raise RuntimeError(f"segment {start}:{end} reads beyond {len(query)} tokens (CUDA: illegal memory access)")
        if end - start > longest[0] or key_end - key_start > longest[1]:
            raise RuntimeError(f"segment {start}:{end} is longer than the stated maximum {longest}")
        output[start:end] = attend(query[start:end], key[key_start:key_end], value[key_start:key_end], **options)
    return output


def put_flash_attention(patch: pytest.MonkeyPatch, *, dtypes: tuple[torch.dtype, ...] = HALF) -> KernelCalls:
    """Make transformers import the kernels below when it loads ``flash_attention_2``.

    Args:
        patch: Restores transformers at the end of the test.
        dtypes: The dtypes that are accepted; flash-attention's own are ``HALF``.
    """
    calls = KernelCalls()

    def check(*tensors: Tensor) -> None:
        if any(tensor.dtype not in dtypes or tensor.dtype != tensors[0].dtype for tensor in tensors):
            raise RuntimeError(f"FlashAttention only supports {dtypes} (got {[tensor.dtype for tensor in tensors]})")

    def flash_attn_func(  # noqa: PLR0917 - flash-attention's own signature
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
        causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:  # fmt: skip
        check(q, k, v)
        limits: dict[str, Any] = {"left": window_size[0], "softcap": softcap}
        calls.add(q, None, causal, **limits)
        rows = [attend(*row, causal=causal, scale=softmax_scale, **limits) for row in zip(q, k, v, strict=True)]
        return torch.stack(rows)

    def flash_attn_varlen_func(  # noqa: PLR0917 - flash-attention's own signature
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, deterministic: bool = False,
    ) -> Tensor:  # fmt: skip
        check(q, k, v)
        limits: dict[str, Any] = {"left": window_size[0], "softcap": softcap}
        calls.add(q, cu_seqlens_q.tolist(), causal, **limits)
        options: dict[str, Any] = {"causal": causal, "scale": softmax_scale, **limits}
        return attend_segments(q, k, v, cu_seqlens_q, cu_seqlens_k, (max_seqlen_q, max_seqlen_k), **options)

    loaded = (flash_attn_func, flash_attn_varlen_func, None, flash_utils._pad_input, flash_utils._unpad_input)
    patch.setattr(flash_utils, "_lazy_imports", lambda *_, **__: loaded)
    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_pad_fn", "_unpad_fn"):
        patch.setattr(flash_utils, name, None)
    for name in ("_flash_with_kvcache_fn", "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
        patch.setattr(flash_utils, name, None)
    return calls


def use_attention(model: Any, name: str) -> None:
    """Set the attention of language model and tower without transformers' check of what is installed."""
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config._attn_implementation = name


@contextmanager
def varlen_kernels() -> Iterator[KernelCalls]:
    """Give torch's ``varlen_attn`` a kernel on the CPU; its operators, their gradients and fakes are torch's own."""
    calls = KernelCalls()

    def forward(  # noqa: PLR0917 - the operator's signature
        query: Tensor, key: Tensor, value: Tensor, ends: Tensor, key_ends: Tensor, longest: int, key_longest: int,
        dropout: float, causal: bool, return_debug_mask: bool = False, *, scale: float | None = None,
        window_size_left: int | None = None, window_size_right: int | None = None, **unused: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert dropout == 0
        causal = causal or window_size_right == 0  # torch passes a causal window as a window
        left = -1 if window_size_left is None else window_size_left
        calls.add(query, ends.tolist(), causal, left=left)
        both = (longest, key_longest)
        output = attend_segments(query, key, value, ends, key_ends, both, causal=causal, scale=scale, left=left)
        lse, unused_state = query.new_zeros(query.shape[1], query.shape[0]), torch.zeros(2, dtype=torch.uint64)
        return output, lse, unused_state, torch.zeros(2, dtype=torch.uint64), query.new_zeros(0)

    def backward(  # noqa: PLR0917 - the operator's signature
        gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, ends: Tensor,
        key_ends: Tensor, longest: int, key_longest: int, dropout: float, causal: bool, *states: Tensor,
        scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        places = ends.tolist()
        segments = [slice(*pair) for pair in pairwise(places)]
        options: dict[str, Any] = {
            "causal": causal or window_size_right == 0, "scale": scale,
            "left": -1 if window_size_left is None else window_size_left,
        }  # fmt: skip
        parts = [
            attend_backward(*(tensor[part] for tensor in (gradient, query, key, value)), **options) for part in segments
        ]
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield calls
    finally:
        library._destroy()
