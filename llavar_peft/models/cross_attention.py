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
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import gcd
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import AutoModel
from transformers import initialization as init
from transformers.integrations import is_deepspeed_zero3_enabled

from llavar_peft.errors import ConfigError
from llavar_peft.models.vision_tower import LinearProjector

_ARGUMENT: Final = "detail"
"""The argument of the decoder layers, and of their attention, that carries a ``Detail``."""


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
        self.q_proj = LinearProjector(width, width, bias=False)
        self.k_proj = LinearProjector(feature_width, width, bias=False)
        self.v_proj = LinearProjector(feature_width, width, bias=False)
        self.o_proj = LinearProjector(width, width, bias=False)

    def forward(self, hidden_BTD: Tensor, features_FC: Tensor, detail: Detail) -> Tensor:
        """Return what is added to hidden states, ``[B, T, D]``.

        Args:
            hidden_BTD: The hidden states after the self-attention.
            features_FC: The features of ``detail``, given apart because sharded modules convert the tensors among
                their arguments.
            detail: Which tokens attend to which features.
        """
        rows_D = hidden_BTD.flatten(0, 1)
        if not detail.segments:
            # Every parameter gets a gradient, and with sharded weights is gathered, on every rank.
            nothing = self._attend(rows_D[:1], features_FC, (DetailSegment(0, 1, 0, 1),), detail) * 0.0
            return torch.zeros_like(hidden_BTD) + nothing
        tokens_SD = torch.cat([rows_D[one.start : one.stop] for one in detail.segments])
        attended_SD = self._attend(tokens_SD, features_FC, detail.segments, detail).to(hidden_BTD.dtype)
        return _spread(attended_SD, detail.segments, len(rows_D)).view_as(hidden_BTD)

    def reset_parameters(self) -> None:
        """Set V to 0 and O to the identity; Q, K and the norm keep their values."""
        init.zeros_(self.v_proj.weight)
        init.eye_(self.o_proj.weight)

    def _attend(
        self, tokens_SD: Tensor, features_FC: Tensor, segments: Sequence[DetailSegment], detail: Detail
    ) -> Tensor:
        query_SHd = self.q_proj(self.norm(tokens_SD.to(self.norm.weight.dtype))).unflatten(1, (self.num_heads, -1))
        absorbed = self._absorbs(max(one.stop - one.start for one in segments))
        if absorbed:
            keys, values, features_FC = None, None, features_FC.to(query_SHd.dtype)
        else:
            keys, values = (
                layer(features_FC).unflatten(1, (self.num_heads, -1)) for layer in (self.k_proj, self.v_proj)
            )
        queries = query_SHd.split([one.stop - one.start for one in segments])
        sources = [detail.features_of(one) for one in segments]
        groups: dict[tuple[int, int], list[int]] = {}
        for number, (query, source) in enumerate(zip(queries, sources, strict=True)):
            groups.setdefault((len(query), source.stop - source.start), []).append(number)
        found: dict[int, Tensor] = {}
        for numbers in groups.values():
            query_NSHd = torch.stack([queries[number] for number in numbers])
            if keys is None or values is None:
                output_NSD = self._attend_absorbed(query_NSHd, torch.stack([features_FC[sources[n]] for n in numbers]))
            else:
                inputs = (query_NSHd, *(torch.stack([all_[sources[n]] for n in numbers]) for all_ in (keys, values)))
                output_NHSd = scaled_dot_product_attention(*(one.transpose(1, 2) for one in inputs))
                output_NSD = output_NHSd.transpose(1, 2).flatten(2)
            found.update(zip(numbers, output_NSD, strict=True))
        attended: Tensor = self.o_proj(torch.cat([found[number] for number in range(len(segments))]))
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
            layer.weight.to(dtype).unflatten(0, (self.num_heads, -1)) for layer in (self.k_proj, self.v_proj)
        )
        query_NSHC = torch.einsum("nshd,hdc->nshc", query_NSHd, keys_HdC)
        scale = query_NSHd.shape[-1] ** -0.5
        mean_NQC = scaled_dot_product_attention(query_NSHC.flatten(1, 2), features_NFC, features_NFC, scale=scale)
        mean_NSHC = mean_NQC.unflatten(1, query_NSHC.shape[1:3])
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
        self.layers = nn.ModuleList(CrossAttentionLayer(width, feature_width, heads) for _ in range(num_layers))
        self.crop_positions = nn.Embedding(num_crops, feature_width) if num_crops else None

    def reset_parameters(self) -> None:
        """Set the positions to 0."""
        if self.crop_positions is not None:
            init.zeros_(self.crop_positions.weight)

    def place(self, features_IFC: Sequence[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
        """Join the features of images, with the positions of their crops added.

        Args:
            features_IFC: The features of each image ``[F, C]``, crop by crop in reading order.

        Returns:
            The features of all images, and where those of each image end, after a 0.
        """
        ends = tuple(accumulate((len(one) for one in features_IFC), initial=0))
        features_FC = torch.cat(list(features_IFC))
        if self.crop_positions is None:
            return features_FC, ends
        count = self.crop_positions.num_embeddings
        positions_GC = self.crop_positions(torch.arange(count, device=features_FC.device))
        if not ends[-1]:
            return positions_GC[:1], ends
        placed = features_FC.view(len(features_IFC), count, -1, features_FC.shape[1]) + positions_GC[:, None]
        return placed.flatten(0, 2), ends


def _spread(attended_SD: Tensor, segments: Sequence[DetailSegment], length: int) -> Tensor:
    """Return the rows of segments at their places, ``[length, D]``, with zeros between them."""
    parts, end = [], 0
    for segment, part in zip(segments, attended_SD.split([one.stop - one.start for one in segments]), strict=True):
        if segment.start > end:
            parts.append(part.new_zeros(segment.start - end, part.shape[1]))
        parts.append(part)
        end = segment.stop
    if length > end:
        parts.append(attended_SD.new_zeros(length - end, attended_SD.shape[1]))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


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
    detail = kwargs.get(_ARGUMENT)
    if detail is None:
        return None
    hidden_BTD = args[0] if args else kwargs["hidden_states"]
    return args, {**kwargs, _ARGUMENT: replace(detail, residual_BTD=hidden_BTD)}


def _add_cross_attention(module: Any, _: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    detail = kwargs.get(_ARGUMENT)
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
        if _ARGUMENT in kwargs:
            found[module.layer_idx] = (kwargs[_ARGUMENT].residual_BTD, output[0] if isinstance(output, tuple) else output)

    with torch.device("meta"), torch.no_grad():
        skeleton: Any = AutoModel.from_config(text_config).eval()
        skeleton.set_attn_implementation("eager")  # flash-attention computes on GPUs only
        layers = list(getattr(skeleton, "layers", ()))
        if not layers or not all(hasattr(layer, "self_attn") for layer in layers):
            return False
        attach_cross_attention(skeleton)
        for layer in layers:
            layer.self_attn.register_forward_hook(watch, with_kwargs=True)
        stack = CrossAttentionStack(len(layers), text_config.hidden_size, 1, 1, 0)
        detail = Detail(stack, torch.zeros(1, 1), (0, 1), (DetailSegment(0, 2, 0, 1),))
        embeds = torch.zeros(1, 2, text_config.hidden_size, dtype=skeleton.dtype)
        # A mask with four dimensions is used as given, while other ones are looked into.
        mask = torch.zeros(1, 1, 2, 2, dtype=skeleton.dtype)
        # What follows the attention cannot always be called without memory (experts), nor attentions of other kinds.
        with suppress(Exception), _Sums() as sums:
            skeleton(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **{_ARGUMENT: detail})
    return bool(found) and all(any(one is a and two is b for a, b in sums.pairs) for one, two in found.values())
