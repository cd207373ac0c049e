"""Read checkpoints in the layout of LLaVA's own code: flat settings, ``mm_projector``, and the vision tower apart.

LLaVAR's released weights have it, those of LLaVA-1.5 and LLaVA 1.6 (``llava``, ``llava_llama``), BakLLaVA's
(``llava_mistral``), and the models with other decoders that ``delta apply`` writes (``llava_qwen2``). LLaVA 1.6 reads
tiles, and has its trained tower among its weights. Features that this package does not have are rejected by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from transformers import AutoTokenizer

from llavar_peft.constants import IMAGE_PATCH_TOKEN, IMAGE_PLACEHOLDER, RELEASED_MODEL_TYPE
from llavar_peft.errors import ConfigError, WeightsError
from llavar_peft.models.language_model_loading import add_placeholder, check_fast, with_mean_rows
from llavar_peft.models.llama_tokenizer import add_image_tokens, load_tokenizer
from llavar_peft.models.llavar_config import flat_language_kind, make_config, read_flat_text_config
from llavar_peft.models.model_parts import ModelParts
from llavar_peft.models.pretrained_files import load_pretrained
from llavar_peft.models.tower_loading import TowerParts
from llavar_peft.recipe.resolution import CrossAttention, Tiles, read_grids, resolution_from
from llavar_peft.recipe.schema import ModelConfig, ProjectorType
from llavar_peft.types import ImageMode, TemplateName
from llavar_peft.weights.delta.flat_settings import FLAT_TEMPLATE, FLAT_TRAINED_TOWER
from llavar_peft.weights.delta.released_layout import check_not_delta
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.joined_rows import JoinedRows
from llavar_peft.weights.io.stated_resolution import FLAT_GRIDS, FLAT_RESOLUTION, FLAT_TILES
from llavar_peft.weights.io.tensor_blocks import open_weights

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

# The values that this package computes; a setting that is missing or null is one of them.
_SUPPORTED: dict[str, tuple[object, ...]] = {
    "image_aspect_ratio": ("pad", "square", "anyres"),
    "mm_patch_merge_type": ("flat", "spatial_unpad"),
    "mm_vision_select_feature": ("patch",),
    "mm_projector_type": get_args(ProjectorType),
    "mm_resampler_type": ("identity",),
    "s2": (False,),
}
_FIX_FEATURES = (
    "use a LLaVA with the features of LLaVA-1.5 or 1.6: one tower, one size of image or tiles, a linear or mlp2x_gelu "
    "projector"
)
LLAMA_TOKENS = ("llama", "mistral")
"""Language models whose ``tokenizer.model`` is read as the original's code reads LLaMA's."""


def is_flat(config_json: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` is that of this layout."""
    model_type = config_json.get("model_type")
    if not isinstance(model_type, str) or {"text_config", "vision_config"} & set(config_json):
        return False
    return model_type == RELEASED_MODEL_TYPE or model_type.startswith(f"{RELEASED_MODEL_TYPE}_")


def check_flat(folder: Path, config_json: Mapping[str, Any], vision_tower: str | None) -> None:
    """Reject a checkpoint that cannot be read, before its tower is: a delta, one of another kind, or without a tower.

    Raises:
        ConfigError: Names the setting.
    """
    stored = open_weights(folder)
    norm = next((stored[name] for name in stored if tensor_names.from_released(name) == tensor_names.FINAL_NORM), None)
    check_not_delta(norm, folder, {"model_type": flat_language_kind(config_json)})
    check_features(folder, config_json)
    if vision_tower is None:
        raise ConfigError.at(
            "model.vision_tower",
            f"not set, and a checkpoint in the released layout contains no vision tower (it was trained with "
            f"{config_json.get('mm_vision_tower')!r})",
            "set it to the folder of the vision tower that the checkpoint was trained with",
        )


def check_features(folder: Path, config_json: Mapping[str, Any]) -> None:
    """Reject settings of LLaVA's code that this package does not compute.

    Raises:
        ConfigError: Names the first of them.
    """
    for name, supported in _SUPPORTED.items():
        if config_json.get(name) not in (None, *supported):
            expected = ", ".join(map(str, supported))
            raise ConfigError.at(
                f"{folder / 'config.json'}:{name}",
                f"not supported (got {ascii(config_json[name])[:80]}, expected {expected})",
                _FIX_FEATURES,
            )
    has_tiles = config_json.get("image_aspect_ratio") == "anyres"
    if has_tiles != (config_json.get("mm_patch_merge_type") == "spatial_unpad"):
        settings = {name: config_json.get(name) for name in FLAT_TILES}
        raise ConfigError.at(
            f"{folder / 'config.json'}:mm_patch_merge_type",
            f"not supported (got {ascii(settings)[:160]}, expected both anyres and spatial_unpad, or none of them)",
            _FIX_FEATURES,
        )
    for name, kind in (("mm_vision_tower", str), ("mm_vision_select_layer", int)):
        if not isinstance(config_json.get(name), kind | None):
            raise ConfigError.at(
                f"{folder / 'config.json'}:{name}",
                f"several of them are not supported (got {ascii(config_json[name])[:80]})",
                _FIX_FEATURES,
            )


def read_flat(folder: Path, config_json: Mapping[str, Any], config: ModelConfig, tower: TowerParts) -> ModelParts:
    """Read a checkpoint that ``check_flat`` accepted.

    Args:
        folder: The checkpoint.
        config_json: The content of its ``config.json``.
        config: With ``image_mode`` and ``vision_feature_layer``, for a checkpoint that does not state them.
        tower: The tower that it was trained with.

    Raises:
        ConfigError: The language model is of no supported kind, or there is no template for its conversations.
        WeightsError: A file cannot be read, or the tokenizer does not belong to the weights.
    """
    stored = {
        our_name: tensor
        for name, tensor in open_weights(folder).items()
        if (our_name := tensor_names.from_released(name))
    }
    text = read_flat_text_config(config_json, folder)
    use_im_start_end = bool(config_json.get("mm_use_im_start_end", False))
    # LLaVA-1.5's code has no image token: it splits the text at each image.
    has_image_token = use_im_start_end or bool(config_json.get("mm_use_im_patch_token", True))
    tokenizer, template = _read_tokenizer(folder, config_json, text, has_image_token=has_image_token)
    if has_image_token:
        add_image_tokens(tokenizer, use_im_start_end=use_im_start_end)
        _check_rows(stored, tokenizer, folder)
    else:
        add_placeholder(tokenizer)
    image_token = IMAGE_PATCH_TOKEN if has_image_token else IMAGE_PLACEHOLDER
    tensors: dict[str, Tensor | JoinedRows] = {**stored, **tower.tensors}
    if text.tie_word_embeddings:
        tensors.pop(tensor_names.HEAD, None)
    rows = text.vocab_size
    if not has_image_token and tensor_names.EMBEDDINGS in stored:
        rows = max(stored[tensor_names.EMBEDDINGS].shape[0], len(tokenizer))
        for name in {tensor_names.EMBEDDINGS, tensor_names.HEAD} & set(tensors):
            tensors[name] = with_mean_rows(stored[name], rows)
    if config_json.get(FLAT_TRAINED_TOWER):
        tensors.update(_trained_tower(folder))
    mode: ImageMode = "square" if config_json.get("image_aspect_ratio") == "square" else config.image_mode
    model_config = make_config(
        text,
        tower.config,
        vocab_size=rows,
        image_token_id=int(tokenizer.convert_tokens_to_ids(image_token)),
        vision_feature_layer=int(config_json.get("mm_vision_select_layer") or config.vision_feature_layer),
        use_im_start_end=use_im_start_end,
        sep_image_conv_front=bool(config_json.get("sep_image_conv_front", False)),
        image_side=tower.side,
        extra_positions=tower.extra_positions,
        # LLaVAR's own configuration does not state it.
        projector_type=cast("ProjectorType", config_json.get("mm_projector_type") or "linear"),
        resolution=read_flat_resolution(config_json, tower.side, folder),
    )
    model_config.tuned_vision_tower = bool(config_json.get(FLAT_TRAINED_TOWER))
    return ModelParts(
        source=str(folder),
        config=model_config,
        tensors=tensors,
        tokenizer=tokenizer,
        image_processor=tower.image_processor,
        image_mode=mode,
        # LLaVAR evaluates with another mode than it trains with: llava/eval/run_llava.py, resize_image.
        inference_image_mode="pad_black" if has_image_token else mode,
        template=template,
        image_token=image_token,
    )


def read_flat_resolution(config_json: Mapping[str, Any], side: int, folder: Path) -> Tiles | CrossAttention | None:
    """Return the resolution of a flat ``config.json``: ours, or the tiles of LLaVA 1.6.

    Args:
        config_json: The content of the file.
        side: Side of a prepared image in pixels.
        folder: Its folder, for messages.

    Raises:
        ConfigError: The settings are damaged, or a size of images is no multiple of a tile.
    """
    where = folder / "config.json"
    if config_json.get(FLAT_RESOLUTION) is not None:
        return resolution_from(config_json[FLAT_RESOLUTION], f"{where}:{FLAT_RESOLUTION}")
    if config_json.get("image_aspect_ratio") != "anyres":
        return None
    # LLaVA's code has (width, height) where stock transformers has (height, width).
    grids = read_grids(config_json.get(FLAT_GRIDS), side, f"{where}:{FLAT_GRIDS}")
    return Tiles(grid=tuple((rows, columns) for columns, rows in grids))


def _trained_tower(folder: Path) -> dict[str, Tensor]:
    """Return the tower that LLaVA's code trained, by our names.

    Raises:
        WeightsError: It is not among the weights.
    """
    tower = {
        our_name: tensor
        for name, tensor in open_weights(folder).items()
        if (our_name := tensor_names.from_released_tower(name))
    }
    if not tower:
        raise WeightsError.at(
            f"{folder / 'config.json'}:{FLAT_TRAINED_TOWER}",
            "its vision tower was trained, and is not among its weights (no tensor model.vision_tower.*)",
            "download the complete weights",
        )
    return tower


def _read_tokenizer(
    folder: Path, config_json: Mapping[str, Any], text: PretrainedConfig, *, has_image_token: bool
) -> tuple[PreTrainedTokenizerFast, TemplateName]:
    """Return the tokenizer, without image tokens that its files do not have, and the template of conversations."""
    language_model, stated_template = flat_language_kind(config_json), config_json.get(FLAT_TEMPLATE)
    if stated_template not in (None, *get_args(TemplateName)):
        known = ", ".join(get_args(TemplateName))
        raise ConfigError.at(
            f"{folder / 'config.json'}:{FLAT_TEMPLATE}",
            f"unknown (got {ascii(stated_template)[:80]}, expected {known})",
            "correct it",
        )
    has_llama_file = language_model in LLAMA_TOKENS and (folder / "tokenizer.model").is_file()
    if has_llama_file or has_image_token or (language_model == "llama" and stated_template is None):
        tokenizer = load_tokenizer(folder)
    else:
        tokenizer = load_pretrained(AutoTokenizer, folder, model_config=text)
        check_fast(tokenizer, folder)
    if stated_template is not None:
        return tokenizer, cast("TemplateName", stated_template)
    if has_image_token:
        return tokenizer, "llava_v1"
    if language_model in LLAMA_TOKENS:
        return tokenizer, "vicuna_v1"
    if tokenizer.chat_template is None:
        raise ConfigError.at(
            str(folder),
            "its tokenizer brings no chat template, which a LLaVA with this language model needs",
            "put the chat_template.jinja of the language model into the folder",
        )
    return tokenizer, "chat"


def _check_rows(tensors: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Reject embeddings that have another number of rows than the tokenizer has tokens: the ids would be shifted."""
    rows = tensors[tensor_names.EMBEDDINGS].shape[0] if tensor_names.EMBEDDINGS in tensors else len(tokenizer)
    if rows != len(tokenizer):
        raise WeightsError.at(
            str(folder),
            f"the embeddings and the tokenizer do not belong together (got {rows} rows and {len(tokenizer)} tokens)",
            "put the tokenizer that the checkpoint was saved with into its folder (added_tokens.json or "
            "tokenizer_config.json states the ids of the added tokens)",
        )
