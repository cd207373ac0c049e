"""The features of the second encoder, for the cross-attention: computed, given, or a zero where there is no image.

Shape suffixes: N images, G crops of an image, P patches of a crop, Q positions of the tower, F features of an image, C
feature width, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled

from llavar_peft.models.cross_attention import CrossAttentionStack, Detail, DetailSegment, detail_segments
from llavar_peft.models.detail_encoder import IMAGES_AT_ONCE, empty_values
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.rank_agreement import is_distributed, largest_of_ranks
from llavar_peft.weights.io import tensor_names

_CROPS = 5  # dimensions
CROPS_AT_ONCE = 64
"""Number of crops that the tower computes at once."""


class ImageDetails:
    """The features of the images of a forward pass, and which tokens attend to them.

    Sharded modules rebuild the lists among their arguments, but not this object, so that the model can return features
    in it.

    Args:
        segments: From ``detail_segments``.
        features_NFC: The features of each image ``[F, C]``, where they are known. Otherwise the model sets them.
    """

    def __init__(self, segments: Sequence[DetailSegment], features_NFC: Sequence[Tensor] = ()) -> None:
        self.segments = tuple(segments)
        self.features_NFC = list(features_NFC)


def make_cross_attention(config: LlavarConfig) -> CrossAttentionStack | None:
    """Return the untrained cross-attention of a model; None if its configuration has none."""
    settings, text = config.cross_attention, config.text_config
    if settings is None:
        return None
    width, crops = int(config.vision_config.hidden_size), settings.grid**2
    if config.detail_config is not None:
        width, crops = int(config.detail_config["hidden_size"]), 0
    return CrossAttentionStack(text.num_hidden_layers, text.hidden_size, width, text.num_attention_heads, crops)


def make_detail(
    model: Any,
    input_ids_BT: Tensor | None,
    embeds_BTD: Tensor,
    detail_values: Tensor | None,
    details: ImageDetails | None,
    *,
    has_images: bool,
) -> Detail | None:
    """Return what the cross-attention of the layers gets; None where it is not called.

    Args:
        model: A ``LlavarModel``.
        input_ids_BT: The rows, if they are known.
        embeds_BTD: Their embeddings.
        detail_values: The encoder's input for images whose features are not known, crops are ``[N, G, 3, S, S]``.
        details: As in ``LlavarModel.forward``; gets the features.
        has_images: Whether the rows' image features are computed, so that the crops are needed as well.

    Raises:
        ValueError: The crops are missing, or given to a model without cross-attention.
    """
    stack: CrossAttentionStack | None = model.cross_attention
    if stack is None:
        if detail_values is not None or details is not None:
            raise ValueError("forward: got detail_values, expected none for a model without cross-attention")
        return None
    if has_images and detail_values is None and details is None:
        raise ValueError("forward: got no detail_values, expected them for a model with cross-attention")
    missing = _missing_encoder_calls(detail_values)
    if detail_values is not None:
        details = details or ImageDetails(find_segments(input_ids_BT, model.config, images=len(detail_values)))
        details.features_NFC = model.get_detail_features(detail_values)
    for _ in range(missing):
        side = model.config.vision_config.image_size
        crop = embeds_BTD.new_zeros(1, 1, 3, side, side)
        encoder = model.detail_encoder
        model.get_detail_features(crop if encoder is None else empty_values(encoder, embeds_BTD))
    details = details or ImageDetails(())
    # Every rank of a run calls the modules, because it has to gather their weights or exchange their gradients.
    if not (details.segments or torch.is_grad_enabled() or is_distributed()):
        return None
    features_FC, ends = stack.place(details.features_NFC, embeds_BTD)
    return Detail(stack, features_FC, ends, details.segments)


def _missing_encoder_calls(detail_values: Tensor | None) -> int:
    """Return how often this rank calls the encoder less often than another: ZeRO-3 gathers its weights in each call.

    Args:
        detail_values: As for ``make_detail``.
    """
    if not is_deepspeed_zero3_enabled():
        return 0
    calls = 0
    if detail_values is not None:
        crops = detail_values.ndim == _CROPS
        calls = -(-detail_values.shape[: 1 + crops].numel() // (CROPS_AT_ONCE if crops else IMAGES_AT_ONCE))
    return largest_of_ranks(calls) - calls


def find_segments(
    input_ids_BT: Tensor | None, config: Any, *, images: int, last: int | None = None
) -> tuple[DetailSegment, ...]:
    """Find the images in padded rows, for which the host waits for the device.

    Args:
        input_ids_BT: The rows.
        config: The model's.
        images: Number of images.
        last: Number of tokens of each row that are computed, its last ones; None is all.

    Raises:
        ValueError: There are no ids, or another number of images.
    """
    if input_ids_BT is None:
        raise ValueError("forward: got no input_ids, expected them, or details, for a model with cross-attention")
    each, total = int(config.image_seq_length), input_ids_BT.shape[1]
    width = total if last is None else last
    conversations, found = [], 0
    for row, is_patch_T in enumerate(input_ids_BT.cpu() == config.image_token_id):
        places = is_patch_T.nonzero()[:, 0].tolist()
        if len(places) % each:
            raise ValueError(f"forward: got {len(places)} image tokens in a row, expected a multiple of {each}")
        conversations.append((row * width, width, [place - (total - width) for place in places[::each]]))
        found += len(places) // each
    if found != images:
        raise ValueError(f"forward: got detail_values of {images} images and {found} images in input_ids")
    return detail_segments(conversations)


def draw_cross_attention(config: LlavarConfig, seed: int) -> dict[str, Tensor]:
    """Draw a cross-attention: Q and K as ``torch.nn.Linear`` is initialized, V zero and O the identity.

    Args:
        config: The model's, with cross-attention.
        seed: Of the random weights.

    Returns:
        Its tensors by their names in the model.

    Source: LLaVAR, appendix H.
    """
    with torch.device("meta"):
        stack: Any = make_cross_attention(config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for own, meta in stack.state_dict().items():
        name, shape, kind = f"{tensor_names.CROSS_ATTENTION}{own}", meta.shape, ".".join(own.split(".")[-2:])
        if kind in ("q_proj.weight", "k_proj.weight"):
            tensors[name] = (torch.rand(shape, generator=generator) * 2 - 1).mul_(shape[1] ** -0.5)
        elif kind == "o_proj.weight":
            tensors[name] = torch.eye(shape[0])
        else:
            tensors[name] = torch.ones(shape) if kind == "norm.weight" else torch.zeros(shape)
    return tensors
