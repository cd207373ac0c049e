"""A model's shapes without its weights: from its ``config.json``, or by name where only the name is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig

from llavar_peft.constants import MODEL_TYPE
from llavar_peft.errors import ConfigError
from llavar_peft.models.llavar_config import LlavarConfig, llama_config_from_released, make_config
from llavar_peft.recipe.schema import ModelConfig

_LLAMA = {"7b": (4096, 11008, 32), "13b": (5120, 13824, 40)}
"""Width, MLP's width, layers and heads. Source: LLaMA (arXiv 2302.13971), table 2, and its released params.json."""
_CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}


def architecture(config: ModelConfig) -> LlavarConfig:
    """Composes the configuration that ``build_model`` would, without opening a weight.

    Args:
        config: Where the model comes from. Folders that are not here are taken by their names: a 7B or 13B of LLaMA's
            shape, a CLIP ViT-L/14.

    Returns:
        The configuration.

    Raises:
        ConfigError: Neither a folder nor a name that says a size.
    """
    if config.checkpoint is not None:
        described = _described(config.checkpoint)
        if described is not None and described.get("model_type") == MODEL_TYPE:
            ours: LlavarConfig = LlavarConfig.from_pretrained(config.checkpoint)
            return ours
        if described is not None and "text_config" in described:
            text, tower = LlamaConfig(**described["text_config"]), CLIPVisionConfig(**described["vision_config"])
            return _composed(config, text, tower, text.vocab_size)
        # The released layout holds the image tokens' rows already.
        text = _llama(config.checkpoint, described, "model.checkpoint")
        rows = text.vocab_size if described is not None else text.vocab_size + _new_rows(config)
        return _composed(config, text, _tower(config.vision_tower), rows)
    name = config.language_model or ""
    text = _llama(name, _described(name), "model.language_model")
    return _composed(config, text, _tower(config.vision_tower), text.vocab_size + _new_rows(config))


def _composed(config: ModelConfig, text: LlamaConfig, tower: CLIPVisionConfig, rows: int) -> LlavarConfig:
    return make_config(
        text,
        tower,
        vocab_size=rows,
        image_token_id=rows - _new_rows(config),
        vision_feature_layer=config.vision_feature_layer,
        use_im_start_end=config.use_im_start_end,
    )


def _new_rows(config: ModelConfig) -> int:
    return 1 + 2 * config.use_im_start_end


def _described(name: str) -> dict[str, Any] | None:
    path = Path(name).expanduser() / "config.json"
    if not path.is_file():
        return None
    try:
        described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError.at(str(path), f"not JSON ({error})", "fetch the model again") from None
    return described


def _llama(name: str, described: dict[str, Any] | None, setting: str) -> LlamaConfig:
    if described is not None:
        return LlamaConfig(**described) if "rope_parameters" in described else llama_config_from_released(described)
    size = re.search(r"(?<![0-9.])(7|13)b(?![a-z0-9])", name.lower())
    if size is None:
        raise ConfigError.at(
            setting, f"no folder, and its name says no size (got {name!r}, expected 7b or 13b in it)", "give a folder"
        )
    width, inner, layers = _LLAMA[size.group()]
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=layers,
        vocab_size=32000,
    )


def _tower(name: str | None) -> CLIPVisionConfig:
    described = _described(name) if name else None
    if described is not None:
        return CLIPVisionConfig(**described.get("vision_config", described))
    side = 336 if name is None or "336" in name else 224
    return CLIPVisionConfig(**_CLIP, image_size=side, patch_size=14)
