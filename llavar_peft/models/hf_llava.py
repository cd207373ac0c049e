"""A LLaVAR in the layout of stock ``transformers`` LLaVA: read it, and write the files it needs besides its weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaConfig,
    LlavaImageProcessorPil,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PretrainedConfig,
)

from llavar_peft.atomic_files import write_json
from llavar_peft.compat.weight_conversion import convert_stored
from llavar_peft.constants import (
    IMAGE_PATCH_TOKEN,
    IMAGE_PLACEHOLDER,
    IMAGE_START_TOKEN,
    STOCK_TILES_MODEL_TYPE,
    TUNED_TOWER,
)
from llavar_peft.data.chat_template import with_image_parts
from llavar_peft.data.conversation_template import image_block
from llavar_peft.errors import ConfigError
from llavar_peft.models.chunked_loss import logits_factor
from llavar_peft.models.engine_support import add_fields_of_4
from llavar_peft.models.llama_tokenizer import load_tokenizer
from llavar_peft.models.llavar_config import make_config
from llavar_peft.models.model_parts import ModelParts
from llavar_peft.models.pretrained_files import load_pretrained
from llavar_peft.models.tower_loading import as_clip_processor, count_extra_positions, prepared_side
from llavar_peft.recipe.resolution import Tiles, read_grids
from llavar_peft.recipe.schema import ProjectorType
from llavar_peft.types import ImageMode, TemplateName
from llavar_peft.weights.delta.released_layout import read_model_config
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.companion_files import PROCESSOR_FILE
from llavar_peft.weights.io.convert_layout import to_one_layer
from llavar_peft.weights.io.tensor_blocks import open_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

# The settings that CLIP's and LLaVA's image processors share.
_SHARED_IMAGE_SETTINGS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "rescale_factor", "image_mean", "image_std",
)  # fmt: skip

_BOS = "{{- bos_token -}}"
"""Put before a template where the tokenizer of a stock model adds the first token to what the template writes."""
_RENAMED_TOWERS = ("dinov3_vit",)
"""Towers whose tensors transformers renames when it loads them alone, by a rule that fails within another model."""


def write_stock_companions(parts: ModelParts, activation: str, dtype: str | None, staged: Path) -> None:
    """Write the configuration, generation settings and processor of the stock layout into a folder.

    Args:
        activation: Name of the activation between the projector's two layers.
        dtype: Of the weights, by torch's name; None if each tensor keeps its own.

    Raises:
        ConfigError: Stock LLaVA cannot express the tower.
    """
    side = parts.processor().image_side
    extra = count_extra_positions(parts.config.vision_config, side, Path(parts.source))
    if extra > 1:
        raise ConfigError.at(
            "to",
            f"stock LLaVA leaves out one position of the tower at most (this one has {extra} that are no patches)",
            "use the layout llavar, or a tower without register tokens",
        )
    kind = parts.config.vision_config.model_type
    if kind in _RENAMED_TOWERS:
        raise ConfigError.at(
            "to", f"transformers does not find the tensors of a {kind} in a stock LLaVA", "use the layout llavar"
        )
    _check_language_model(parts)
    text = parts.config.text_config
    if getattr(text, "final_logit_softcapping", None) is not None or logits_factor(text) is not None:
        logger.warning(
            "stock LLaVA of transformers neither caps nor scales logits, as this language model does: the most "
            "probable tokens are the same, but probabilities and sampled answers differ"
        )
    if parts.inference_image_mode not in ("pad", "square") and parts.config.tiles is None:
        logger.warning(
            "images will be padded with the mean color: stock LLaVA does not support the mode %s",
            parts.inference_image_mode,
        )
    _check_tiles(parts, side)
    config = _stock_config(parts, activation)
    _check_names(parts, config)
    ours = {TUNED_TOWER: True} if parts.config.tuned_vision_tower else {}  # stock transformers keeps unknown fields
    described = {**config.to_diff_dict(), **ours, **({"dtype": dtype} if dtype is not None else {})}
    write_json(staged / "config.json", described)
    write_json(staged / "generation_config.json", parts.processor().generation_ids)
    shared = {name: getattr(parts.image_processor, name) for name in _SHARED_IMAGE_SETTINGS}
    images: Any
    if isinstance(config, LlavaNextConfig):
        # LLaVA-NeXT would resize each tile again if these two differed.
        shared.update(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        images = LlavaNextImageProcessorPil(image_grid_pinpoints=config.image_grid_pinpoints, **shared)
    else:
        images = LlavaImageProcessorPil(do_pad=parts.inference_image_mode != "square", **shared)
    processor: Any = LlavaNextProcessor if isinstance(config, LlavaNextConfig) else LlavaProcessor
    processor(
        image_processor=images,
        tokenizer=parts.tokenizer,
        patch_size=parts.config.vision_config.patch_size,
        vision_feature_select_strategy=parts.config.vision_feature_select_strategy,
        chat_template=stock_chat_template(parts),
        image_token=parts.image_token,
        # The class token, which the strategy "default" removes again.
        num_additional_image_tokens=int(parts.config.vision_feature_select_strategy == "default"),
    ).save_pretrained(str(staged))
    add_fields_of_4(staged)


def _check_language_model(parts: ModelParts) -> None:
    """Reject a language model whose head stock LLaVA cannot have."""
    tied = parts.config.tie_word_embeddings and tensor_names.find_embeddings(parts.tensors) != tensor_names.EMBEDDINGS
    if tied or tensor_names.HEAD_BIAS in parts.tensors:
        what = "is tied to embeddings of another name than LLaMA's" if tied else "has a bias"
        raise ConfigError.at(
            "to",
            f"stock LLaVA cannot have this language model's head, which {what} (got "
            f"{parts.config.text_config.model_type!r})",
            "use the layout llavar",
        )


def _check_names(parts: ModelParts, config: PretrainedConfig) -> None:
    """Reject a language model whose tensors transformers does not find in a stock LLaVA, by its rules of conversion."""
    with torch.device("meta"):
        stock = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
        kinds = ("language_model.", "lm_head.")
        ours = {tensor_names.to_stock(name): torch.empty(tuple(one.shape)) for name, one in parts.tensors.items()}
        found = convert_stored(stock, {name: one for name, one in ours.items() if name.startswith(kinds)})
    expected = {
        name: one for name, one in stock.state_dict().items() if name.startswith((f"model.{kinds[0]}", kinds[1]))
    }
    if config.tie_word_embeddings:
        expected.pop(tensor_names.HEAD)
    shapes = [{name: tuple(one.shape) for name, one in table.items()} for table in (found, expected)]
    if shapes[0] != shapes[1]:
        kind = parts.config.text_config.model_type
        what = f"transformers does not find the tensors of a language model {kind!r} in a stock LLaVA"
        raise ConfigError.at("to", what, "use the layout llavar")


def read_stock(folder: Path) -> ModelParts:
    """Read a model in the layout of stock transformers: LLaVA-1.5, LLaVA-NeXT (1.6), or an export of ours.

    Returns:
        Its parts. Two layers that stand for LLaVAR's single one become that again.

    Raises:
        ConfigError: A setting that this package does not support.
        WeightsError: A file cannot be read, or the projector has no form that this package supports.
    """
    has_tiles = read_model_config(folder).get("model_type") == STOCK_TILES_MODEL_TYPE
    described: Any = load_pretrained(LlavaNextConfig if has_tiles else LlavaConfig, folder)
    _check_stock(described, folder)
    tokenizer, image_token = _stock_tokenizer(described, folder)
    tensors = {ours: tensor for name, tensor in open_weights(folder).items() if (ours := tensor_names.from_stock(name))}
    projector_type: ProjectorType = "mlp2x_gelu"
    if described.projector_hidden_act != "gelu":
        projector_type = "linear"
        weight, bias = to_one_layer(tensors, described.projector_hidden_act, str(folder))
        tensors = {name: one for name, one in tensors.items() if not name.startswith(tensor_names.STOCK_PROJECTOR)}
        tensors.update({tensor_names.PROJECTOR_WEIGHT: weight, tensor_names.PROJECTOR_BIAS: bias})
    images = load_pretrained(LlavaNextImageProcessorPil if has_tiles else LlavaImageProcessorPil, folder)
    if has_tiles:
        _check_tile_size(images, folder)
    side = prepared_side(images, str(folder))
    config = make_config(
        described.text_config,
        described.vision_config,
        vocab_size=described.text_config.vocab_size,
        image_token_id=described.image_token_index,
        vision_feature_layer=described.vision_feature_layer,
        use_im_start_end=IMAGE_START_TOKEN in tokenizer.get_vocab(),
        image_side=side,
        extra_positions=int(described.vision_feature_select_strategy == "default"),
        projector_type=projector_type,
        resolution=Tiles(
            grid=read_grids(described.image_grid_pinpoints, side, f"{folder / 'config.json'}:image_grid_pinpoints")
        )
        if has_tiles
        else None,
    )
    config.tuned_vision_tower = bool(read_model_config(folder).get(TUNED_TOWER))
    if config.tie_word_embeddings:
        tensors.pop(tensor_names.HEAD, None)
    mode: ImageMode = "pad" if images.do_pad and not has_tiles else "square"
    template, chat_template = _stock_template(tokenizer, image_token, folder)
    return ModelParts(
        source=str(folder),
        config=config,
        tensors={**tensors},
        tokenizer=tokenizer,
        image_processor=as_clip_processor(images),  # LlavarProcessor decides how images are padded
        image_mode=mode,
        inference_image_mode=mode,
        template=template,
        image_token=image_token,
        chat_template=chat_template,
    )


def _check_tile_size(images: LlavaNextImageProcessorPil, folder: Path) -> None:
    """Reject settings with which stock LLaVA-NeXT resizes each tile again.

    Raises:
        ConfigError: States the two sizes.
    """
    size, tile = (
        {length for length in dict(stated or {}).values() if length is not None}
        for stated in (images.size, images.crop_size or images.size)
    )
    if len(size) != 1 or size != tile:
        files = [folder / name for name in ("preprocessor_config.json", PROCESSOR_FILE)]
        file = next((path for path in files if path.is_file()), files[0])
        raise ConfigError.at(
            f"{file}:size",
            f"not the size of a tile (got {ascii(dict(images.size or {}))[:80]}, expected {min(tile, default=0)} "
            f"pixels, that of crop_size)",
            f"copy {file.name} from the model's original folder",
        )
    # Stock LLaVA-NeXT cuts tiles of crop_size, cropped or not.
    images.crop_size, images.do_center_crop = {"height": min(tile), "width": min(tile)}, True


def _check_tiles(parts: ModelParts, side: int) -> None:
    """Reject what LLaVA-NeXT of transformers cannot express.

    Raises:
        ConfigError: Names the setting.
    """
    tiles = parts.config.tiles
    if tiles is None:
        return
    if tiles.pool != 1:
        raise ConfigError.at(
            "to", f"LLaVA-NeXT does not average patches (got pool {tiles.pool})", "use the layout llavar, or pool 1"
        )
    if side != parts.config.vision_config.image_size:
        raise ConfigError.at(
            "to",
            f"LLaVA-NeXT's tiles have the size in the tower's configuration (got {side} pixels, expected "
            f"{parts.config.vision_config.image_size})",
            "use the layout llavar",
        )
    if tiles.max_image_tokens is not None:
        logger.warning("max_image_tokens is lost: stock LLaVA-NeXT always cuts an image into the best grid")


def _check_stock(described: LlavaConfig | LlavaNextConfig, folder: Path) -> None:
    where = folder / "config.json"
    if not isinstance(described.vision_feature_layer, int):
        raise ConfigError.at(
            f"{where}:vision_feature_layer",
            f"several layers are not supported (got {described.vision_feature_layer}, expected an integer)",
            "use a LLaVA that projects one hidden state of its tower",
        )
    has_class_token = described.vision_config.model_type == "clip_vision_model"
    if has_class_token and described.vision_feature_select_strategy != "default":
        raise ConfigError.at(
            f"{where}:vision_feature_select_strategy",
            "image features with CLIP's class token are not supported (got 'full', expected 'default')",
            "use a LLaVA that drops the class token",
        )


def _stock_tokenizer(described: LlavaConfig | LlavaNextConfig, folder: Path) -> tuple[PreTrainedTokenizerFast, str]:
    """Return the tokenizer and the image token, whose id the configuration states."""
    tokenizer: Any = load_pretrained(AutoTokenizer, folder)
    if IMAGE_PATCH_TOKEN in tokenizer.get_vocab():
        tokenizer = load_tokenizer(folder)
    token = tokenizer.convert_ids_to_tokens(described.image_token_index)
    is_llavar = IMAGE_PATCH_TOKEN in tokenizer.get_vocab()
    if token is None or token not in tokenizer.get_added_vocab() or (is_llavar and token != IMAGE_PATCH_TOKEN):
        expected = tokenizer.convert_tokens_to_ids(IMAGE_PATCH_TOKEN)
        raise ConfigError.at(
            f"{folder / 'config.json'}:image_token_index",
            f"is not the id of an image token (got {described.image_token_index}, which is {token!r} in the tokenizer"
            + (f", expected {expected} for {IMAGE_PATCH_TOKEN})" if is_llavar else ")"),
            "put the tokenizer that the model was saved with into its folder",
        )
    return tokenizer, str(token)


def _stock_template(tokenizer: Any, image_token: str, folder: Path) -> tuple[TemplateName, str | None]:
    """Return the conversation template of a model, and its Jinja template if it is the tokenizer's own."""
    if image_token == IMAGE_PATCH_TOKEN:
        return "llava_v1", None
    found = load_pretrained(LlavaProcessor, folder).chat_template or tokenizer.chat_template
    # LLaVA-1.5 was trained with this role; its template in transformers leaves out system prompt and </s>.
    if not isinstance(found, str) or "ASSISTANT:" in found:
        return "vicuna_v1", None
    adds_bos = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    missing_bos = adds_bos and "bos_token" not in found and tokenizer.bos_token not in found
    return "chat", (_BOS if missing_bos else "") + with_image_parts(found)


def _stock_config(parts: ModelParts, activation: str) -> LlavaConfig | LlavaNextConfig:
    ours, tiles = parts.config, parts.config.tiles
    shared: dict[str, Any] = {
        "text_config": ours.text_config,
        "vision_config": ours.vision_config,
        "image_token_index": ours.image_token_index,
        "image_seq_length": ours.image_seq_length,
        "projector_hidden_act": activation,
        "vision_feature_layer": ours.vision_feature_layer,
        "vision_feature_select_strategy": ours.vision_feature_select_strategy,
        "multimodal_projector_bias": True,
        "tie_word_embeddings": ours.tie_word_embeddings,
    }
    if tiles is None:
        return LlavaConfig(**shared, architectures=["LlavaForConditionalGeneration"])
    side = ours.vision_config.image_size
    sizes = [[rows * side, columns * side] for rows, columns in tiles.grids]
    return LlavaNextConfig(**shared, image_grid_pinpoints=sizes, architectures=["LlavaNextForConditionalGeneration"])


def stock_chat_template(parts: ModelParts) -> str:
    """Return the conversation template for a stock processor.

    It writes the ``<s>`` that a stock processor does not add, and one image token per image, which a stock processor
    repeats for each patch of the tower.
    """
    template: str = parts.processor().chat_template
    if parts.template == "chat":
        return template.removeprefix(_BOS)
    block = image_block(1, use_im_start_end=parts.config.use_im_start_end, patch=parts.image_token)
    start = "{{- bos_token -}}\n" if parts.tokenizer.bos_token is not None else ""
    return start + template.replace(IMAGE_PLACEHOLDER, block)
