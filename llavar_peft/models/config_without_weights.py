"""The configuration of a model whose weights are not read, and may not be on this disk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaNextConfig,
    PretrainedConfig,
)

from llavar_peft.constants import IMAGE_PLACEHOLDER, IMAGE_START_TOKEN, MODEL_TYPE, STOCK_TILES_MODEL_TYPE
from llavar_peft.errors import ConfigError
from llavar_peft.models.detail_encoder import read_encoder_config
from llavar_peft.models.flat_layout import read_flat_resolution
from llavar_peft.models.known_models import KNOWN_MODELS, LLAMA_SIZES, TOKENS
from llavar_peft.models.llavar_config import LlavarConfig, make_config, read_flat_text_config, read_llama_config
from llavar_peft.models.pretrained_files import load_pretrained, make_part_settings
from llavar_peft.models.tower_loading import as_clip_processor, count_extra_positions, prepared_side
from llavar_peft.recipe.resolution import (
    CONCAT_CLIP,
    Tiles,
    checked_resolution,
    describe_resolution,
    read_grids,
    resolution_from,
)
from llavar_peft.recipe.schema import ModelConfig, ProjectorType
from llavar_peft.types import expand_home
from llavar_peft.weights.delta.released_layout import read_model_config
from llavar_peft.weights.io.hub_folders import cached_folder, is_hub_name
from llavar_peft.weights.io.stated_resolution import RESOLUTION

_OF_LLAMA_S_SHAPE = re.compile(r"llama|vicuna|llava|alpaca")
_OF_ANOTHER_SHAPE = re.compile(r"mistral|mixtral|qwen|gemma|phi-?\d|olmo|yi-|llama-?[34]")
_SIZE = re.compile(r"(?<![0-9.])(7|13)b(?![a-z0-9])")

_LLAMA_VOCABULARY = 32000  # of LLaMA 1 and 2, and of Vicuna


@dataclass(frozen=True, slots=True)
class _Source:
    """What is known about a named model.

    Attributes:
        config_json: The content of its ``config.json``.
        folder: Its folder; for a model that is not on this disk, only for messages.
        tokens: Number of its tokenizer's tokens, if it is known without a tokenizer.
    """

    config_json: dict[str, Any]
    folder: Path
    tokens: int | None = None

    def load_tokenizer(self) -> Any:
        """Return the model's tokenizer, or None if its folder has none that ``AutoTokenizer`` reads unchanged."""
        return load_pretrained(AutoTokenizer, self.folder) if (self.folder / "tokenizer.json").is_file() else None


@dataclass(frozen=True, slots=True)
class _TowerSettings:
    """A tower's configuration, the side of a prepared image in pixels, and the number of positions without a patch."""

    config: PretrainedConfig
    side: int
    extra_positions: int


def config_without_weights(model: ModelConfig) -> LlavarConfig:
    """Return the configuration that ``build_model`` would use, without reading weights and without the network.

    Args:
        model: The model's source. The size of a part that is neither a folder nor in the hub's cache is taken from
            ``KNOWN_MODELS``, or from its name: 7B or 13B of LLaMA's shape, with a CLIP ViT-L/14.

    Raises:
        ConfigError: The size of a part is unknown.
    """
    config = _read_config(model)
    if model.resolution is not None:
        config.resolution = describe_resolution(checked_resolution(model.resolution, "model.resolution"))
    crossed = config.cross_attention
    if crossed is not None and crossed.encoder != CONCAT_CLIP and config.detail_config is None:
        config.detail_config = read_encoder_config(crossed.encoder, "model.resolution.encoder")
    return config


def _read_config(model: ModelConfig) -> LlavarConfig:
    """Return the configuration without the resolution that the settings add."""
    if model.checkpoint is not None:
        return _of_checkpoint(model, model.checkpoint)
    name = model.language_model or ""
    source = _find(name)
    if source is None:
        text = _llama_by_name(name, "model.language_model")
        legacy = model.template in (None, "llava_v1")
        return _compose(model, text, text.vocab_size + (not legacy), legacy=legacy)
    tokenizer = source.load_tokenizer()
    legacy = _is_vicuna(source, tokenizer) if model.template is None else model.template == "llava_v1"
    if source.config_json.get("model_type") in ("llama", None) and legacy:
        text = read_llama_config(source.config_json, source.folder)
    else:
        text = make_part_settings(source.config_json, source.folder, default="llama")
    tokens = (source.tokens or text.vocab_size) if tokenizer is None else len(tokenizer)
    if legacy:
        text.tie_word_embeddings = False
        return _compose(model, text, tokens, legacy=True)
    has_image_token = tokenizer is not None and IMAGE_PLACEHOLDER in tokenizer.get_vocab()
    return _compose(model, text, tokens + (not has_image_token), legacy=False)


def _compose(model: ModelConfig, text: PretrainedConfig, tokens: int, *, legacy: bool) -> LlavarConfig:
    """Return the configuration of a language model with a tower.

    Args:
        tokens: Number of tokens, for a template other than ``llava_v1`` with the image token.
        legacy: Whether the template is ``llava_v1``, with tokens of its own and without spare rows.
    """
    tower = _tower(model.vision_tower)
    rows = tokens + 1 + 2 * model.use_im_start_end if legacy else max(text.vocab_size, tokens)
    return make_config(
        text,
        tower.config,
        vocab_size=rows,
        image_token_id=tokens if legacy else tokens - 1,
        vision_feature_layer=model.vision_feature_layer,
        use_im_start_end=legacy and model.use_im_start_end,
        image_side=tower.side,
        extra_positions=tower.extra_positions,
        projector_type=model.projector_type,
    )


def _of_checkpoint(model: ModelConfig, name: str) -> LlavarConfig:
    source = _find(name)
    if source is None:
        text = _llama_by_name(name, "model.checkpoint")
        return _compose(model, text, text.vocab_size, legacy=True)
    config_json, folder = source.config_json, source.folder
    if config_json.get("model_type") == MODEL_TYPE:
        config = load_pretrained(LlavarConfig, folder)
        resolution_from(config.resolution, f"{folder / 'config.json'}:{RESOLUTION}")
        if model.vision_tower is not None:
            config.vision_config = _tower(model.vision_tower).config
        return config
    if "text_config" in config_json:
        return _of_stock(source)
    text = read_flat_text_config(config_json, folder)
    use_im_start_end = bool(config_json.get("mm_use_im_start_end", False))
    has_image_rows = use_im_start_end or bool(config_json.get("mm_use_im_patch_token", True))
    stated = config_json.get("mm_projector_type", "linear")
    tower = _tower(model.vision_tower)
    return make_config(
        text,
        tower.config,
        vocab_size=text.vocab_size + (not has_image_rows),
        image_token_id=text.vocab_size - has_image_rows * (1 + 2 * use_im_start_end),
        vision_feature_layer=int(config_json.get("mm_vision_select_layer", model.vision_feature_layer)),
        use_im_start_end=use_im_start_end,
        image_side=tower.side,
        extra_positions=tower.extra_positions,
        projector_type=cast("ProjectorType", stated) if stated in get_args(ProjectorType) else "linear",
        resolution=read_flat_resolution(config_json, tower.side, folder),
    )


def _of_stock(source: _Source) -> LlavarConfig:
    config_json, folder = source.config_json, source.folder
    text = make_part_settings(config_json["text_config"], folder, default="llama")
    tower = make_part_settings(config_json.get("vision_config"), folder, default="clip_vision_model")
    tokenizer = source.load_tokenizer()
    tiled = config_json.get("model_type") == STOCK_TILES_MODEL_TYPE
    where, pinpoints = f"{folder / 'config.json'}:image_grid_pinpoints", LlavaNextConfig().image_grid_pinpoints
    pinpoints = config_json.get("image_grid_pinpoints") or pinpoints
    return make_config(
        text,
        tower,
        vocab_size=text.vocab_size,
        image_token_id=config_json.get("image_token_index", text.vocab_size - 1),
        vision_feature_layer=config_json.get("vision_feature_layer", -2),
        use_im_start_end=tokenizer is not None and IMAGE_START_TOKEN in tokenizer.get_vocab(),
        image_side=int(tower.image_size) if tiled else _side(folder, tower),
        extra_positions=int(config_json.get("vision_feature_select_strategy", "default") == "default"),
        projector_type="mlp2x_gelu" if config_json.get("projector_hidden_act", "gelu") == "gelu" else "linear",
        resolution=Tiles(grid=read_grids(pinpoints, int(tower.image_size), where)) if tiled else None,
    )


def _find(name: str) -> _Source | None:
    """Return what is known about a model: from its folder, the hub's cache, or ``KNOWN_MODELS``."""
    for folder in (expand_home(name), cached_folder(name)):
        if folder is not None and (folder / "config.json").is_file():
            return _Source(read_model_config(folder), folder)
    return _Source(dict(KNOWN_MODELS[name]), Path(name), TOKENS.get(name)) if name in KNOWN_MODELS else None


def _is_vicuna(source: _Source, tokenizer: Any) -> bool:
    """Return whether a language model gets the template ``llava_v1`` where none is set."""
    if source.config_json.get("model_type") not in ("llama", None):
        return False
    if (source.folder / "tokenizer.model").is_file():
        return True
    if tokenizer is not None:
        return tokenizer.chat_template is None
    tied, rows = (source.config_json.get(name) for name in ("tie_word_embeddings", "vocab_size"))
    return not tied and (rows or 0) < _LLAMA_VOCABULARY + 1000


def _llama_by_name(name: str, setting: str) -> PretrainedConfig:
    lower = name.lower()
    size = _SIZE.search(lower)
    if size is None or not _OF_LLAMA_S_SHAPE.search(lower) or _OF_ANOTHER_SHAPE.search(lower):
        lacks = "the name contains no size" if size is None else "the name is none of a LLaMA"
        raise ConfigError.at(
            setting,
            f"not a folder, not in the hub's cache, and {lacks} (got {name!r}, expected a name such as vicuna-7b)",
            _fix(name, "config.json"),
        )
    return make_part_settings(dict(LLAMA_SIZES[size.group()]), Path(name), default="llama")


def _fix(name: str, files: str) -> str:
    return "give the model's folder" + (f", or run `hf download {name} {files}`" if is_hub_name(name) else "")


def _tower(name: str | None) -> _TowerSettings:
    source = _find(name) if name else None
    if source is not None:
        config_json = source.config_json
        is_whole_clip = config_json.get("model_type") == "clip"
        fields = config_json.get("vision_config", config_json) if is_whole_clip else config_json
        config: Any = make_part_settings(fields, source.folder, default="clip_vision_model")
        config = getattr(config, "vision_config", config)
        side = _side(source.folder, config)
        if side < config.patch_size:
            raise ConfigError.at(
                str(source.folder),
                f"images are prepared smaller than a patch of the tower (got {side} pixels, expected at least "
                f"{config.patch_size})",
                "copy the image processor's file from the vision tower's original folder",
            )
        return _TowerSettings(config, side, count_extra_positions(config, side, source.folder))
    lower = (name or "clip-vit-large-patch14-336").lower()
    if "clip" not in lower or not re.search(r"vit-?l(arge)?\b", lower):
        raise ConfigError.at(
            "model.vision_tower",
            f"not a folder, not in the hub's cache, and of unknown size (got {name!r}, expected a name such as "
            f"openai/clip-vit-large-patch14-336)",
            _fix(name or "", "config.json preprocessor_config.json"),
        )
    known = KNOWN_MODELS["openai/clip-vit-large-patch14" + ("-336" if "336" in lower else "")]
    clip = CLIPVisionConfig(**known)
    return _TowerSettings(clip, int(clip.image_size), 1)


def _side(folder: Path, tower: PretrainedConfig) -> int:
    """Return the side of a prepared image in pixels, which the image processor decides."""
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return int(tower.image_size)
    if isinstance(tower, CLIPVisionConfig):
        return prepared_side(load_pretrained(CLIPImageProcessorPil, folder), str(folder))
    return prepared_side(as_clip_processor(load_pretrained(AutoImageProcessor, folder)), str(folder))
