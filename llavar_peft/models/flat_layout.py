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


def is_flat(described: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` is that of this layout."""
    kind = described.get("model_type")
    known = isinstance(kind, str) and (kind == RELEASED_MODEL_TYPE or kind.startswith(f"{RELEASED_MODEL_TYPE}_"))
    return known and not {"text_config", "vision_config"} & set(described)


def check_flat(folder: Path, described: Mapping[str, Any], vision_tower: str | None) -> None:
    """Reject a checkpoint that cannot be read, before its tower is: a delta, one of another kind, or without a tower.

    Raises:
        ConfigError: Names the setting.
    """
    stored = open_weights(folder)
    norm = next((stored[name] for name in stored if tensor_names.from_released(name) == tensor_names.FINAL_NORM), None)
    check_not_delta(norm, folder, {"model_type": flat_language_kind(described)})
    check_features(folder, described)
    if vision_tower is None:
        raise ConfigError.at(
            "model.vision_tower",
            f"not set, and a checkpoint in the released layout contains no vision tower (it was trained with "
            f"{described.get('mm_vision_tower')!r})",
            "set it to the folder of the vision tower that the checkpoint was trained with",
        )


def check_features(folder: Path, described: Mapping[str, Any]) -> None:
    """Reject settings of LLaVA's code that this package does not compute.

    Raises:
        ConfigError: Names the first of them.
    """
    for name, supported in _SUPPORTED.items():
        if described.get(name) not in (None, *supported):
            expected = ", ".join(map(str, supported))
            raise ConfigError.at(
                f"{folder / 'config.json'}:{name}",
                f"not supported (got {ascii(described[name])[:80]}, expected {expected})",
                _FIX_FEATURES,
            )
    if (described.get("image_aspect_ratio") == "anyres") != (described.get("mm_patch_merge_type") == "spatial_unpad"):
        settings = {name: described.get(name) for name in FLAT_TILES}
        raise ConfigError.at(
            f"{folder / 'config.json'}:mm_patch_merge_type",
            f"not supported (got {ascii(settings)[:160]}, expected both anyres and spatial_unpad, or none of them)",
            _FIX_FEATURES,
        )
    for name, kind in (("mm_vision_tower", str), ("mm_vision_select_layer", int)):
        if not isinstance(described.get(name), kind | None):
            raise ConfigError.at(
                f"{folder / 'config.json'}:{name}",
                f"several of them are not supported (got {ascii(described[name])[:80]})",
                _FIX_FEATURES,
            )


def read_flat(folder: Path, described: Mapping[str, Any], config: ModelConfig, tower: TowerParts) -> ModelParts:
    """Read a checkpoint that ``check_flat`` accepted.

    Args:
        folder: The checkpoint.
        described: Its ``config.json``.
        config: With ``image_mode`` and ``vision_feature_layer``, for a checkpoint that does not state them.
        tower: The tower that it was trained with.

    Raises:
        ConfigError: The language model is of no supported kind, or there is no template for its conversations.
        WeightsError: A file cannot be read, or the tokenizer does not belong to the weights.
    """
    stored = {ours: one for name, one in open_weights(folder).items() if (ours := tensor_names.from_released(name))}
    text = read_flat_text_config(described, folder)
    use_im_start_end = bool(described.get("mm_use_im_start_end", False))
    # LLaVA-1.5's code has no image token: it splits the text at each image.
    has_image_token = use_im_start_end or bool(described.get("mm_use_im_patch_token", True))
    tokenizer, template = _read_tokenizer(folder, described, text, has_image_token=has_image_token)
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
    if described.get(FLAT_TRAINED_TOWER):
        tensors.update(_trained_tower(folder))
    mode: ImageMode = "square" if described.get("image_aspect_ratio") == "square" else config.image_mode
    made = make_config(
        text,
        tower.config,
        vocab_size=rows,
        image_token_id=int(tokenizer.convert_tokens_to_ids(image_token)),
        vision_feature_layer=int(described.get("mm_vision_select_layer") or config.vision_feature_layer),
        use_im_start_end=use_im_start_end,
        sep_image_conv_front=bool(described.get("sep_image_conv_front", False)),
        image_side=tower.side,
        extra_positions=tower.extra_positions,
        # LLaVAR's own configuration does not state it.
        projector_type=cast("ProjectorType", described.get("mm_projector_type") or "linear"),
        resolution=read_flat_resolution(described, tower.side, folder),
    )
    made.tuned_vision_tower = bool(described.get(FLAT_TRAINED_TOWER))
    return ModelParts(
        source=str(folder),
        config=made,
        tensors=tensors,
        tokenizer=tokenizer,
        image_processor=tower.image_processor,
        image_mode=mode,
        # LLaVAR evaluates with another mode than it trains with: llava/eval/run_llava.py, resize_image.
        inference_image_mode="pad_black" if has_image_token else mode,
        template=template,
        image_token=image_token,
    )


def read_flat_resolution(described: Mapping[str, Any], side: int, folder: Path) -> Tiles | CrossAttention | None:
    """Return the resolution of a flat ``config.json``: ours, or the tiles of LLaVA 1.6.

    Args:
        described: The file.
        side: Side of a prepared image in pixels.
        folder: Its folder, for messages.

    Raises:
        ConfigError: The settings are damaged, or a size of images is no multiple of a tile.
    """
    where = folder / "config.json"
    if described.get(FLAT_RESOLUTION) is not None:
        return resolution_from(described[FLAT_RESOLUTION], f"{where}:{FLAT_RESOLUTION}")
    if described.get("image_aspect_ratio") != "anyres":
        return None
    # LLaVA's code has (width, height) where stock transformers has (height, width).
    grids = read_grids(described.get(FLAT_GRIDS), side, f"{where}:{FLAT_GRIDS}")
    return Tiles(grid=tuple((rows, columns) for columns, rows in grids))


def _trained_tower(folder: Path) -> dict[str, Tensor]:
    """Return the tower that LLaVA's code trained, by our names.

    Raises:
        WeightsError: It is not among the weights.
    """
    stored = open_weights(folder).items()
    found = {ours: one for name, one in stored if (ours := tensor_names.from_released_tower(name))}
    if not found:
        raise WeightsError.at(
            f"{folder / 'config.json'}:{FLAT_TRAINED_TOWER}",
            "its vision tower was trained, and is not among its weights (no tensor model.vision_tower.*)",
            "download the complete weights",
        )
    return found


def _read_tokenizer(
    folder: Path, described: Mapping[str, Any], text: PretrainedConfig, *, has_image_token: bool
) -> tuple[PreTrainedTokenizerFast, TemplateName]:
    """Return the tokenizer, without image tokens that its files do not have, and the template of conversations."""
    kind, stated = flat_language_kind(described), described.get(FLAT_TEMPLATE)
    if stated not in (None, *get_args(TemplateName)):
        known = ", ".join(get_args(TemplateName))
        raise ConfigError.at(
            f"{folder / 'config.json'}:{FLAT_TEMPLATE}",
            f"unknown (got {ascii(stated)[:80]}, expected {known})",
            "correct it",
        )
    as_llama = kind in LLAMA_TOKENS and (folder / "tokenizer.model").is_file()
    if as_llama or has_image_token or (kind == "llama" and stated is None):
        tokenizer = load_tokenizer(folder)
    else:
        tokenizer = load_pretrained(AutoTokenizer, folder, model_config=text)
        check_fast(tokenizer, folder)
    if stated is not None:
        return tokenizer, cast("TemplateName", stated)
    if has_image_token:
        return tokenizer, "llava_v1"
    if kind in LLAMA_TOKENS:
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
