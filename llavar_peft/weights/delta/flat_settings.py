"""The flat ``config.json`` of LLaVA's code: settings of a language model, and LLaVA's own next to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavar_peft.constants import IMAGE_PATCH_TOKEN, MODEL_TYPE, RELEASED_MODEL_TYPE
from llavar_peft.errors import DAMAGED
from llavar_peft.weights.io.companion_files import ADDED_TOKENS_FILE, CHAT_TEMPLATE_FILE
from llavar_peft.weights.io.stated_resolution import flat_resolution, stated_resolution

_TEXT_FIELDS = (
    "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "rms_norm_eps", "vocab_size",
)  # fmt: skip
FLAT_TEMPLATE = "mm_template"
"""In a flat configuration of ours: the conversation template, where LLaVA's code has none for the language model."""
FLAT_TRAINED_TOWER = "unfreeze_mm_vision_tower"
"""In LLaVA 1.6's configuration: the tower was trained, and is among the weights."""
_PART_FIELDS = {"_name_or_path", "architectures", "dtype", "model_type", "torch_dtype", "transformers_version"}
"""Fields of a language model's own configuration that do not describe it."""
_ORIGINAL_TOWER = "openai/clip-vit-large-patch14-336"


def stated_template(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the conversation template of a model that is not flat: of ours by its processor, of others by its files.

    Args:
        folder: The model.
        config: Its ``config.json``.
    """
    if config.get("model_type") == MODEL_TYPE:
        return str(_read_json(folder / "processor_config.json").get("template", "llava_v1"))
    names = (ADDED_TOKENS_FILE, "tokenizer_config.json", "tokenizer.json")
    if any(IMAGE_PATCH_TOKEN in _read_text(folder / name) for name in names):
        return "llava_v1"
    jinja = _read_text(folder / CHAT_TEMPLATE_FILE)
    return "chat" if jinja and "ASSISTANT:" not in jinja else "vicuna_v1"


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object, empty if the file does not exist or is damaged: another reader reports that."""
    try:
        found = json.loads(_read_text(path) or "{}")
    except DAMAGED:
        return {}
    return found if isinstance(found, dict) else {}


def flatten_config(config: Mapping[str, Any], *, template: str = "llava_v1") -> dict[str, Any]:
    """Convert our ``config.json`` to the flat one of the released layout, which LLaVA's code reads.

    Args:
        config: With ``text_config`` and ``vision_config``.
        template: The model's conversation template.

    Source: the ``config.json`` of the released LLaVAR delta, and of ``liuhaotian/llava-v1.5-7b``.
    """
    text, vision = config["text_config"], config["vision_config"]
    kind = text.get("model_type", "llama")
    like_llama = _is_first_llama(text)
    flat = {key: text[key] for key in _TEXT_FIELDS if key in text} if like_llama else _flatten_text(text)
    is_original = (vision.get("hidden_size"), vision.get("image_size"), vision.get("patch_size")) == (1024, 336, 14)
    tower = _ORIGINAL_TOWER if is_original else vision.get("_name_or_path") or "clip"
    if text.get("num_key_value_heads") not in (None, text.get("num_attention_heads")):
        flat["num_key_value_heads"] = text["num_key_value_heads"]  # unknown to the original's LLaMA
    own = {"pad_token_id": 0, "tie_word_embeddings": False, "transformers_version": "4.28.1"} if like_llama else {}
    if template != "llava_v1":
        # As in LLaVA-1.5, whose code splits the text at each image.
        own["mm_use_im_patch_token"] = False
    if not like_llama or template == "chat":
        own[FLAT_TEMPLATE] = template
    return dict(
        sorted(
            {
                **flat,
                "architectures": [f"Llava{kind.title().replace('_', '')}ForCausalLM"],
                "freeze_mm_mlp_adapter": False,
                "mm_hidden_size": vision["hidden_size"],
                **({"mm_projector_type": "mlp2x_gelu"} if config.get("projector_hidden_act") == "gelu" else {}),
                "mm_use_im_start_end": template == "llava_v1" and config.get("use_im_start_end", True),
                "mm_vision_select_layer": config.get("vision_feature_layer", -2),
                "mm_vision_tower": tower,
                "model_type": RELEASED_MODEL_TYPE if kind == "llama" else f"{RELEASED_MODEL_TYPE}_{kind}",
                "sep_image_conv_front": config.get("sep_image_conv_front", False),
                "torch_dtype": "float16",
                "tune_mm_mlp_adapter": False,
                "use_cache": True,
                "use_mm_proj": True,
                **own,
                **flat_resolution(stated_resolution(config), int(vision.get("image_size") or 0)),
            }.items()
        )
    )


def is_released_format(config: Mapping[str, Any]) -> bool:
    """Return whether a flat configuration is one that LLaVAR's own code reads: of LLaMA, without later additions."""
    return config.get("model_type") == RELEASED_MODEL_TYPE and FLAT_TEMPLATE not in config


def _is_first_llama(text: Mapping[str, Any]) -> bool:
    """Return whether the original's LLaMA can express a language model: without what later LLaMAs changed."""
    stated = [text.get(name) for name in ("rope_scaling", "rope_parameters")]
    rope = {"rope_theta": text.get("rope_theta")}
    for one in stated:
        rope |= one if isinstance(one, Mapping) else {}
    width, heads, size = (text.get(name) for name in ("head_dim", "num_attention_heads", "hidden_size"))
    return (
        text.get("model_type", "llama") == "llama"
        and rope.get("rope_type", rope.get("type", "default")) == "default"
        and rope.get("rope_theta", text.get("rope_theta")) in (None, 10000)
        and not any(text.get(name) for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"))
        and (width is None or (isinstance(width, int) and isinstance(heads, int) and width * heads == size))
    )


def _flatten_text(text: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a language model, with those of its positions as LLaVA's transformers names them."""
    flat = {name: value for name, value in text.items() if name not in _PART_FIELDS}
    rope = flat.get("rope_parameters")
    if isinstance(rope, Mapping) and not any(isinstance(value, Mapping) for value in rope.values()):
        del flat["rope_parameters"]
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        flat["rope_theta"] = rope.get("rope_theta", 10000.0)
        flat["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    return flat
