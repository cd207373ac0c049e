"""Cross-attention of a language model's layers to the features of a second encoder of higher resolution.

After the self-attention of every layer, with x = the layer's input + the attention's output::

    x + O softmax(Q K^T / sqrt(d)) V      Q from LayerNorm(x), K and V from the features

At the start V is 0 and O the identity, so that the model answers as it does without. The modules stand apart from the
language model, whose names stay as they are; hooks call them. What they need is passed down with the arguments of the
forward pass, so that recomputing a layer in the backward pass finds it as well.

A token attends to the features of those images of its conversation that start at or before it. A row is therefore cut
where images start, and each segment is one attention without a mask.

Shape suffixes: B rows, T tokens, S tokens of segments, I images, F features of all images, D language model width, C
feature width, H heads, G crops of an image.

Source: LLaVAR, appendix H, of which no code was released. The paper does not mention positions; without an embedding of
its own, a crop's features would not tell where in the image it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations import is_deepspeed_zero3_enabled


@dataclass(frozen=True, slots=True)
class DetailSegment:
    """Neighbouring tokens that attend to the same images.

    Attributes:
        start: The first token, counted over the rows in reading order.
        stop: The end of the tokens.
        first: The first image, counted over the rows in reading order.
        last: The end of the images.
    """

    start: int
    stop: int
    first: int
    last: int


def detail_segments(conversations: Iterable[tuple[int, int, Sequence[int]]]) -> tuple[DetailSegment, ...]:
    """Cut conversations into segments; tokens before the first image belong to none.

    Args:
        conversations: For each, in reading order: its first token, counted over the rows; its number of tokens; and the
            token at which each of its images starts, counted from its first one. The number is negative for an image
            before these tokens, whose keys and values are in the cache.
    """
    segments: list[DetailSegment] = []
    first = 0
    for start, length, images in conversations:
        edges = [min(max(image, 0), length) for image in images] + [length]
        segments += [
            DetailSegment(start + left, start + right, first, first + number)
            for number, (left, right) in enumerate(pairwise(edges), start=1)
            if left < right
        ]
        first += len(images)
    return tuple(segments)


@dataclass(frozen=True, slots=True, eq=False)
class Detail:
    """What the layers of the language model attend to in one forward pass.

    Attributes:
        modules: The layers' modules.
        features_FC: The features of all images, one image after the other.
        ends: Where the features of each image end, after a 0.
        segments: Which tokens attend to which images. Without any, the modules compute a zero.
        residual_BTD: The input of the layer that is computed.
    """

    modules: CrossAttentionStack
    features_FC: Tensor
    ends: tuple[int, ...]
    segments: tuple[DetailSegment, ...]
    residual_BTD: Tensor | None = None

    def features_of(self, segment: DetailSegment) -> slice:
        """Return where the features are that a segment attends to."""
        return slice(self.ends[segment.first], self.ends[segment.last])


class CrossAttentionLayer(nn.Module):
    """The cross-attention of one layer.

    Args:
        width: Width of the language model.
        feature_width: Width of the features.
        num_heads: Number of heads.
    """

    def __init__(self, width: int, feature_width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(feature_width, width, bias=False)
        self.v_proj = nn.Linear(feature_width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden_BTD: Tensor, features_FC: Tensor, detail: Detail) -> Tensor:
        """Return what is added to hidden states, ``[B, T, D]``.

        Args:
            hidden_BTD: The hidden states after the self-attention.
            features_FC: The features of ``detail``, given apart because sharded modules convert the tensors among
                their arguments.
            detail: Which tokens attend to which features.
        """
        hidden_ND = hidden_BTD.flatten(0, 1)  # N tokens of all rows
        if not detail.segments:
            # Every parameter gets a gradient, and with sharded weights is gathered, on every rank.
            zero = self._attend(hidden_ND[:1], features_FC, (DetailSegment(0, 1, 0, 1),), detail) * 0.0
            return torch.zeros_like(hidden_BTD) + zero
        tokens_SD = torch.cat([hidden_ND[segment.start : segment.stop] for segment in detail.segments])
        attended_SD = self._attend(tokens_SD, features_FC, detail.segments, detail).to(hidden_BTD.dtype)
        return _spread(attended_SD, detail.segments, len(hidden_ND)).view_as(hidden_BTD)

    def _attend(
        self, tokens_SD: Tensor, features_FC: Tensor, segments: Sequence[DetailSegment], detail: Detail
    ) -> Tensor:
        """Return the attention's output for the tokens of segments, one segment after the other, ``[S, D]``."""
        # The base may be in half precision while this is in float32; in a training step autocast decides.
        if _autocast_dtype(tokens_SD) is None:
            dtype = self.norm.weight.dtype
            tokens_SD, features_FC = tokens_SD.to(dtype), features_FC.to(dtype)
        query_SHd = self.q_proj(self.norm(tokens_SD)).unflatten(1, (self.num_heads, -1))
        lengths = [segment.stop - segment.start for segment in segments]
        if self._absorbs(max(lengths)):
            keys, values, features_FC = None, None, features_FC.to(query_SHd.dtype)
        else:
            keys, values = (
                layer(features_FC).unflatten(1, (self.num_heads, -1)) for layer in (self.k_proj, self.v_proj)
            )
        queries = query_SHd.split(lengths)
        sources = [detail.features_of(segment) for segment in segments]
        # Segments with the same numbers of tokens and of features are computed together.
        groups: dict[tuple[int, int], list[int]] = {}
        for number, (query, source) in enumerate(zip(queries, sources, strict=True)):
            groups.setdefault((len(query), source.stop - source.start), []).append(number)
        outputs: dict[int, Tensor] = {}
        for numbers in groups.values():
            query_NSHd = torch.stack([queries[number] for number in numbers])
            if keys is None or values is None:
                features_NFC = torch.stack([features_FC[sources[number]] for number in numbers])
                output_NSD = self._attend_absorbed(query_NSHd, features_NFC)
            else:
                key_NFHd = torch.stack([keys[sources[number]] for number in numbers])
                value_NFHd = torch.stack([values[sources[number]] for number in numbers])
                output_NHSd = scaled_dot_product_attention(
                    query_NSHd.transpose(1, 2), key_NFHd.transpose(1, 2), value_NFHd.transpose(1, 2)
                )
                output_NSD = output_NHSd.transpose(1, 2).flatten(2)
            outputs.update(zip(numbers, output_NSD, strict=True))
        attended: Tensor = self.o_proj(torch.cat([outputs[number] for number in range(len(segments))]))
        return attended

    def _absorbs(self, tokens: int) -> bool:
        """Return whether attending in the space of the features takes fewer operations than computing K and V."""
        few = tokens * self.num_heads < self.k_proj.out_features
        # ZeRO-3 gathers a weight when its layer is called.
        return few and not torch.is_grad_enabled() and not is_deepspeed_zero3_enabled()

    def _attend_absorbed(self, query_NSHd: Tensor, features_NFC: Tensor) -> Tensor:
        """Return the attention's output ``[N, S, D]``, by scores (Q W_k) F^T and values (softmax F) W_v^T.

        The same numbers up to rounding, without K and V of all features.
        """
        dtype = query_NSHd.dtype
        keys_HdC, values_HdC = (
            layer.weight.to(dtype).view(self.num_heads, -1, layer.in_features) for layer in (self.k_proj, self.v_proj)
        )
        query_NSHC = torch.einsum("nshd,hdc->nshc", query_NSHd, keys_HdC)
        scale = query_NSHd.shape[-1] ** -0.5
        mean_NQC = scaled_dot_product_attention(query_NSHC.flatten(1, 2), features_NFC, features_NFC, scale=scale)
        mean_NSHC = mean_NQC.view_as(query_NSHC)
        return torch.einsum("nshc,hdc->nshd", mean_NSHC, values_HdC).flatten(2)


class CrossAttentionStack(nn.Module):
    """The cross-attention of all layers of a language model.

    Args:
        num_layers: Number of layers of the language model.
        width: Width of the language model.
        feature_width: Width of the features.
        num_heads: Number of heads of the language model.
        num_crops: Number of crops of an image; 0 for an encoder that sees the image as a whole.
    """

    def __init__(self, num_layers: int, width: int, feature_width: int, num_heads: int, num_crops: int) -> None:
        super().__init__()
        heads = gcd(num_heads, width)
        self.layers: Any = nn.ModuleList(CrossAttentionLayer(width, feature_width, heads) for _ in range(num_layers))
        self.crop_positions = nn.Embedding(num_crops, feature_width) if num_crops else None

    def reset_parameters(self) -> None:
        """Set V and the positions to 0 and O to the identity; Q, K and the norms keep their values."""
        for layer in self.layers:
            nn.init.zeros_(layer.v_proj.weight)
            nn.init.eye_(layer.o_proj.weight)
        if self.crop_positions is not None:
            nn.init.zeros_(self.crop_positions.weight)

    def place(self, features_NFC: Sequence[Tensor], like: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Join the features of images, with the positions of their crops added.

        Args:
            features_NFC: The features of each image ``[F, C]``, crop by crop in reading order.
            like: A tensor of the hidden states' dtype and device.

        Returns:
            The features of all images, and where those of each image end, after a 0. Without an image, a single zero.
        """
        at_least_one = list(features_NFC) or [like.new_zeros(1, self.layers[0].k_proj.in_features)]
        features_FC, ends = torch.cat(at_least_one), tuple(accumulate(map(len, at_least_one), initial=0))
        if self.crop_positions is None:
            return features_FC, ends
        count = self.crop_positions.num_embeddings
        positions_GC = self.crop_positions(torch.arange(count, device=features_FC.device))
        if not features_NFC:
            return features_FC + positions_GC[:1], ends
        placed_NGPC = features_FC.view(len(at_least_one), count, -1, features_FC.shape[1]) + positions_GC[:, None]
        # Once for all layers, each of which would otherwise keep a copy for its backward pass.
        return placed_NGPC.flatten(0, 2).to(_autocast_dtype(like) or placed_NGPC.dtype), ends


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast computes in on a tensor's device; None where it is not active."""
    device = tensor.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return None
    return torch.get_autocast_dtype(device)


def _spread(attended_SD: Tensor, segments: Sequence[DetailSegment], length: int) -> Tensor:
    """Return the rows of segments at their places, ``[length, D]``, with zeros between them."""
    parts, end = [], 0
    lengths = [segment.stop - segment.start for segment in segments]
    for segment, rows in zip(segments, torch.split(attended_SD, lengths), strict=True):
        if segment.start > end:
            parts.append(rows.new_zeros(segment.start - end, rows.shape[1]))
        parts.append(rows)
        end = segment.stop
    if length > end:
        parts.append(attended_SD.new_zeros(length - end, attended_SD.shape[1]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]
