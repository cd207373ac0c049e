"""Tensor names: ours, the released layout's, stock LLaVA's, and a CLIP folder's. The one table.

Ours are the module names of ``LlavarForConditionalGeneration``; the released ones those of LLaVAR's
``LlavaLlamaForCausalLM``; the stock ones those of ``transformers.LlavaForConditionalGeneration`` as they stand in
checkpoints on the hub, which transformers 4 and 5, vLLM and SGLang all read.
"""

from __future__ import annotations

import re

PROJECTOR_WEIGHT = "model.multi_modal_projector.weight"
PROJECTOR_BIAS = "model.multi_modal_projector.bias"
EMBEDDINGS = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"
TOWER = "model.vision_tower."

RELEASED_PROJECTOR_WEIGHT = "model.mm_projector.weight"
RELEASED_PROJECTOR_BIAS = "model.mm_projector.bias"
RELEASED_EMBEDDINGS = "model.embed_tokens.weight"

STOCK_PROJECTOR = "model.multi_modal_projector.linear_"
"""How our name of a tensor of stock LLaVA's two-layer projector begins."""

# As on the hub, as the modules of transformers 5 are called, and in between.
_STOCK = (
    ("language_model.model.", "model.language_model."),
    ("model.language_model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("lm_head.", "lm_head."),
    ("vision_tower.vision_model.", TOWER),
    ("model.vision_tower.vision_model.", TOWER),
    ("vision_tower.", TOWER),
    ("model.vision_tower.", TOWER),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("model.multi_modal_projector.", "model.multi_modal_projector."),
)
# A buffer that old checkpoints hold; RoPE's frequencies are computed.
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$|(^|\.)position_ids$")
# The original sometimes saved a copy of the tower inside the model.
_RELEASED_TOWER = re.compile(r"^model\.vision_tower\.")
_RELEASED_BODY = re.compile(r"^model\.(?=embed_tokens\.|layers\.|norm\.)")
_RELEASED_PROJECTOR = re.compile(r"^model\.mm_projector\.")
_CLIP_OTHER = re.compile(r"^(text_model\.|text_projection|visual_projection|logit_scale)")


def from_released(name: str) -> str | None:
    """Our name of a tensor in the released layout (or of a plain LLaMA).

    Args:
        name: E.g. ``model.layers.0.mlp.up_proj.weight``.

    Returns:
        E.g. ``model.language_model.layers.0.mlp.up_proj.weight``; None for a tensor that is tolerated but not needed.
    """
    if _IGNORED.search(name) or _RELEASED_TOWER.match(name):
        return None
    name = _RELEASED_PROJECTOR.sub("model.multi_modal_projector.", name)
    return _RELEASED_BODY.sub("model.language_model.", name)


def to_released(name: str) -> str | None:
    """The released layout's name of one of our tensors.

    Args:
        name: One of our names.

    Returns:
        The released name; None for the tower's tensors, which that layout does not hold.
    """
    if name.startswith(TOWER):
        return None
    if name.startswith("model.multi_modal_projector."):
        return "model.mm_projector." + name.removeprefix("model.multi_modal_projector.")
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name


def from_stock(name: str) -> str | None:
    """Our name of a tensor of stock LLaVA.

    Args:
        name: E.g. ``language_model.model.layers.0.mlp.up_proj.weight``, as on the hub, or as the modules are called.

    Returns:
        E.g. ``model.language_model.layers.0.mlp.up_proj.weight``; the projector's two layers keep their own names,
        below ``STOCK_PROJECTOR``. None for a tensor that is tolerated but not needed.
    """
    if _IGNORED.search(name):
        return None
    for theirs, ours in _STOCK:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def to_stock(name: str) -> str:
    """Stock LLaVA's name of one of our tensors, as on the hub.

    Args:
        name: One of our names, or one below ``STOCK_PROJECTOR``.

    Returns:
        The stock name.
    """
    for theirs, ours in _STOCK:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def from_clip(name: str) -> str | None:
    """Our name of a tensor of a CLIP folder (a whole CLIP, or its vision tower alone).

    Args:
        name: E.g. ``vision_model.encoder.layers.0.mlp.fc1.weight``.

    Returns:
        E.g. ``model.vision_tower.encoder.layers.0.mlp.fc1.weight``; None for the text tower and for buffers.
    """
    if _IGNORED.search(name) or _CLIP_OTHER.match(name):
        return None
    return TOWER + name.removeprefix("vision_model.")
