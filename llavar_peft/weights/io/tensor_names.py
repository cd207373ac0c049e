"""Conversion between our tensor names and those of the released layout, stock LLaVA and CLIP.

Ours are the module names of ``LlavarForConditionalGeneration``, the released ones those of LLaVAR's
``LlavaLlamaForCausalLM``, and the stock ones those of ``transformers.LlavaForConditionalGeneration`` in checkpoints on
the hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

PROJECTOR = "model.multi_modal_projector."
PROJECTOR_WEIGHT = "model.multi_modal_projector.weight"
PROJECTOR_BIAS = "model.multi_modal_projector.bias"
EMBEDDINGS = "model.language_model.embed_tokens.weight"
HEAD = "lm_head.weight"
HEAD_BIAS = "lm_head.bias"
TOWER = "model.vision_tower."
FINAL_NORM = "model.language_model.norm.weight"

EMBEDDING_NAMES = ("embed_tokens", "embed_in", "word_embeddings", "wte", "decoder.embed_tokens", "embeddings")
"""Names of the input embeddings in transformers' decoders, the first of which is LLaMA's."""
_LAYERS = ("layers", "h", "blocks", "decoder.layers")
LAYER = re.compile(rf"(?:^|\.)language_model\.(?:{'|'.join(map(re.escape, _LAYERS))})\.(\d{{1,6}})\.")
"""Part of the name of a module or tensor in a decoder's layer; the group is the layer's number."""

NEWLINE = "model.multi_modal_projector.image_newline"
"""The embedding at the end of each row of a tiled image's patches. It is trained and saved with the projector."""

CROSS_ATTENTION = "model.cross_attention."
DETAIL_ENCODER = "model.detail_encoder."
"""The second encoder of the cross-attention, where that is not the tower."""
TRAINED_WITH_PROJECTOR = (PROJECTOR, CROSS_ATTENTION)
"""How the names begin of what aligns images with the language model, which stage 1 trains and adapters contain."""

RELEASED_PROJECTOR = "model.mm_projector."
RELEASED_PROJECTOR_WEIGHT = "model.mm_projector.weight"
RELEASED_PROJECTOR_BIAS = "model.mm_projector.bias"
RELEASED_EMBEDDINGS = "model.embed_tokens.weight"
RELEASED_NEWLINE = "model.image_newline"
"""In LLaVA-NeXT, of all layouts; older files on the hub have it without the prefix."""

STOCK_PROJECTOR = "model.multi_modal_projector.linear_"
"""Prefix of our names of the tensors of a two-layer projector, as in stock LLaVA."""

STOCK_NEWLINE = "image_newline"
# Prefixes on the hub, of the modules of transformers 5, and of versions in between.
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
_WITH_VISION_MODEL = ("clip_vision_model", "siglip_vision_model")
# Buffers in old checkpoints; the frequencies of RoPE are computed.
_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$|(^|\.)position_ids$")
# The original sometimes saved a copy of the tower in the model.
_RELEASED_TOWER = re.compile(r"^model\.vision_tower\.(vision_tower\.)?(vision_model\.)?")
_RELEASED_BODY = re.compile(r"^model\.(?=embed_tokens\.|layers\.|norm\.)")
# The layers of an MLP, which the original layout numbers within ``nn.Sequential``.
_MLP_LAYERS = (("0.", "linear_1."), ("2.", "linear_2."))
_CLIP_OTHER = re.compile(r"^(text_model\.|text_projection|visual_projection|logit_scale|logit_bias)")


def is_layers(name: str) -> bool:
    """Return whether a module of this name in a decoder can hold its layers."""
    return name in _LAYERS


def is_embeddings(name: str) -> bool:
    """Return whether a module of this name in a decoder can be its input embeddings."""
    return name in EMBEDDING_NAMES


def find_embeddings(names: Iterable[str]) -> str:
    """Return our name of the input embeddings among a model's names; LLaMA's if there are none."""
    known = {f"model.language_model.{name}.weight" for name in EMBEDDING_NAMES}
    return next((name for name in names if name in known), EMBEDDINGS)


def projector_names(activation: object, *, tiles: bool = False) -> tuple[str, ...]:
    """Return our names of a projector's tensors.

    Args:
        activation: The configuration's ``projector_hidden_act``; ``"linear"``, or None in configurations without it,
            stands for a single layer.
        tiles: Whether the model reads tiles, whose rows end with an embedding.
    """
    layers = ("",) if activation in (None, "linear") else ("linear_1.", "linear_2.")
    names = tuple(f"{PROJECTOR}{layer}{part}" for layer in layers for part in ("weight", "bias"))
    return (*names, NEWLINE) if tiles else names


def from_released(name: str) -> str | None:
    """Return our name of a tensor in the released layout or of a plain LLaMA; None for a tensor that is ignored.

    E.g. ``model.layers.0.mlp.up_proj.weight`` gives ``model.language_model.layers.0.mlp.up_proj.weight``.
    """
    if _IGNORED.search(name) or _RELEASED_TOWER.match(name):
        return None
    if name == RELEASED_NEWLINE:
        return NEWLINE
    if name.startswith(RELEASED_PROJECTOR):
        own = name.removeprefix(RELEASED_PROJECTOR)
        return PROJECTOR + next((new + own[len(old) :] for old, new in _MLP_LAYERS if own.startswith(old)), own)
    return _RELEASED_BODY.sub("model.language_model.", name)


def from_released_tower(name: str) -> str | None:
    """Return our name of a tensor of a tower that LLaVA's code trained and saved in the model; None for all others."""
    found = _RELEASED_TOWER.match(name)
    return None if found is None or _IGNORED.search(name) else TOWER + name[found.end() :]


def from_released_with_tower(name: str) -> str | None:
    """Return our name of a tensor in the released layout, of which the vision tower was trained and is a part."""
    return from_released_tower(name) or from_released(name)


def to_released(name: str) -> str | None:
    """Return the released name of one of our tensors; None for the encoders', which that layout does not have."""
    if name.startswith((TOWER, DETAIL_ENCODER)):
        return None
    if name == NEWLINE:
        return RELEASED_NEWLINE
    if name.startswith(PROJECTOR):
        own = name.removeprefix(PROJECTOR)
        return RELEASED_PROJECTOR + next(
            (old + own[len(new) :] for old, new in _MLP_LAYERS if own.startswith(new)), own
        )
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return name


def from_stock(name: str) -> str | None:
    """Return our name of a tensor of stock LLaVA; None for a tensor that is ignored.

    E.g. ``language_model.model.norm.weight`` gives ``model.language_model.norm.weight``.
    The two layers of the projector keep their own names, with the prefix ``STOCK_PROJECTOR``.
    """
    if _IGNORED.search(name):
        return None
    if name in (RELEASED_NEWLINE, STOCK_NEWLINE):
        return NEWLINE
    for stock, ours in _STOCK:
        if name.startswith(stock):
            return ours + name.removeprefix(stock)
    return name


def to_stock(name: str, tower: str = "clip_vision_model") -> str:
    """Return stock LLaVA's name, as on the hub, of one of our tensors or one below ``STOCK_PROJECTOR``.

    Args:
        name: Our name.
        tower: The kind of vision tower. transformers removes ``vision_model.`` from the names of CLIP and SigLIP only.
    """
    if name == NEWLINE:
        return STOCK_NEWLINE
    if name.startswith(TOWER) and tower not in _WITH_VISION_MODEL:
        return "vision_tower." + name.removeprefix(TOWER)
    for stock, ours in _STOCK:
        if name.startswith(ours):
            return stock + name.removeprefix(ours)
    return name


def from_clip(name: str) -> str | None:
    """Return our name of a tensor of CLIP, SigLIP or their vision tower; None for the text tower and for buffers.

    E.g. ``vision_model.encoder.layers.0.mlp.fc1.weight`` gives ``model.vision_tower.encoder.layers.0.mlp.fc1.weight``.
    """
    if _IGNORED.search(name) or _CLIP_OTHER.match(name):
        return None
    return TOWER + name.removeprefix("vision_model.")
