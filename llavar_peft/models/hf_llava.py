"""The layout of stock ``transformers`` LLaVA: read a model in it, and write an export's files besides its weights."""

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
from llavar_peft.weights.io.companion_files import IMAGES_FILE, PROCESSOR_FILE
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
    _check_tower(parts, side)
    _check_head(parts)
    _warn_of_differences(parts)
    _check_tiles(parts, side)
    stock_config = _stock_config(parts, activation)
    _check_names(parts, stock_config)
    config_json = stock_config.to_diff_dict()
    if parts.config.tuned_vision_tower:
        config_json[TUNED_TOWER] = True  # stock transformers keeps unknown fields
    if dtype is not None:
        config_json["dtype"] = dtype
    write_json(staged / "config.json", config_json)
    write_json(staged / "generation_config.json", parts.processor().generation_ids)
    _write_processor(parts, stock_config, side, staged)
    add_fields_of_4(staged)


def _write_processor(parts: ModelParts, stock_config: LlavaConfig | LlavaNextConfig, side: int, staged: Path) -> None:
    """Write a processor of stock transformers into a folder, which prepares images and prompts as this model's does."""
    shared = {name: getattr(parts.image_processor, name) for name in _SHARED_IMAGE_SETTINGS}
    image_processor: Any
    processor_class: Any
    if isinstance(stock_config, LlavaNextConfig):
        # LLaVA-NeXT would resize each tile again if these two differed.
        shared.update(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=stock_config.image_grid_pinpoints, **shared)
        processor_class = LlavaNextProcessor
    else:
        image_processor = LlavaImageProcessorPil(do_pad=parts.inference_image_mode != "square", **shared)
        processor_class = LlavaProcessor
    processor_class(
        image_processor=image_processor,
        tokenizer=parts.tokenizer,
        patch_size=parts.config.vision_config.patch_size,
        vision_feature_select_strategy=parts.config.vision_feature_select_strategy,
        chat_template=stock_chat_template(parts),
        image_token=parts.image_token,
        # The class token, which the strategy "default" removes again.
        num_additional_image_tokens=int(parts.config.vision_feature_select_strategy == "default"),
    ).save_pretrained(str(staged))


def _check_tower(parts: ModelParts, side: int) -> None:
    """Reject a vision tower that stock LLaVA cannot run, or whose tensors transformers would not find."""
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


def _warn_of_differences(parts: ModelParts) -> None:
    """Warn of what a stock LLaVA computes in another way than the model."""
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


def _check_head(parts: ModelParts) -> None:
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
        stock_model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
        to_convert = {
            stock_name: torch.empty(tuple(tensor.shape))
            for name, tensor in parts.tensors.items()
            if (stock_name := tensor_names.to_stock(name)).startswith(("language_model.", "lm_head."))
        }
        converted = convert_stored(stock_model, to_convert)
    expected = {
        name: tensor
        for name, tensor in stock_model.state_dict().items()
        if name.startswith(("model.language_model.", "lm_head."))
    }
    if config.tie_word_embeddings:
        expected.pop(tensor_names.HEAD)
    got_shapes, expected_shapes = (
        {name: tuple(tensor.shape) for name, tensor in table.items()} for table in (converted, expected)
    )
    if got_shapes != expected_shapes:
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
    stock_config: Any = load_pretrained(LlavaNextConfig if has_tiles else LlavaConfig, folder)
    _check_stock_config(stock_config, folder)
    tokenizer, image_token = _stock_tokenizer(stock_config, folder)
    tensors = {
        our_name: tensor for name, tensor in open_weights(folder).items() if (our_name := tensor_names.from_stock(name))
    }
    projector_type: ProjectorType = "mlp2x_gelu"
    if stock_config.projector_hidden_act != "gelu":
        projector_type = "linear"
        weight, bias = to_one_layer(tensors, stock_config.projector_hidden_act, str(folder))
        tensors = {
            name: tensor for name, tensor in tensors.items() if not name.startswith(tensor_names.STOCK_PROJECTOR)
        }
        tensors.update({tensor_names.PROJECTOR_WEIGHT: weight, tensor_names.PROJECTOR_BIAS: bias})
    image_processor = load_pretrained(LlavaNextImageProcessorPil if has_tiles else LlavaImageProcessorPil, folder)
    if has_tiles:
        _check_tile_size(image_processor, folder)
    side = prepared_side(image_processor, str(folder))
    resolution = None
    if has_tiles:
        where = f"{folder / 'config.json'}:image_grid_pinpoints"
        resolution = Tiles(grid=read_grids(stock_config.image_grid_pinpoints, side, where))
    config = make_config(
        stock_config.text_config,
        stock_config.vision_config,
        vocab_size=stock_config.text_config.vocab_size,
        image_token_id=stock_config.image_token_index,
        vision_feature_layer=stock_config.vision_feature_layer,
        use_im_start_end=IMAGE_START_TOKEN in tokenizer.get_vocab(),
        image_side=side,
        extra_positions=int(stock_config.vision_feature_select_strategy == "default"),
        projector_type=projector_type,
        resolution=resolution,
    )
    config.tuned_vision_tower = bool(read_model_config(folder).get(TUNED_TOWER))
    if config.tie_word_embeddings:
        tensors.pop(tensor_names.HEAD, None)
    mode: ImageMode = "pad" if image_processor.do_pad and not has_tiles else "square"
    template, chat_template = _stock_template(tokenizer, image_token, folder)
    return ModelParts(
        source=str(folder),
        config=config,
        tensors={**tensors},
        tokenizer=tokenizer,
        image_processor=as_clip_processor(image_processor),  # LlavarProcessor decides how images are padded
        image_mode=mode,
        inference_image_mode=mode,
        template=template,
        image_token=image_token,
        chat_template=chat_template,
    )


def _check_tile_size(image_processor: LlavaNextImageProcessorPil, folder: Path) -> None:
    """Reject settings with which stock LLaVA-NeXT resizes each tile again; set the crop to the size of a tile.

    Raises:
        ConfigError: States the two sizes.
    """
    stated_size, stated_crop = image_processor.size or {}, image_processor.crop_size or image_processor.size or {}
    sides = {length for length in dict(stated_size).values() if length is not None}
    tile_sides = {length for length in dict(stated_crop).values() if length is not None}
    if len(sides) != 1 or sides != tile_sides:
        files = [folder / name for name in (IMAGES_FILE, PROCESSOR_FILE)]
        file = next((path for path in files if path.is_file()), files[0])
        raise ConfigError.at(
            f"{file}:size",
            f"not the size of a tile (got {ascii(dict(stated_size))[:80]}, expected {min(tile_sides, default=0)} "
            f"pixels, that of crop_size)",
            f"copy {file.name} from the model's original folder",
        )
    # Stock LLaVA-NeXT cuts tiles of crop_size, cropped or not.
    tile_side = min(tile_sides)
    image_processor.crop_size = {"height": tile_side, "width": tile_side}
    image_processor.do_center_crop = True


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


def _check_stock_config(stock_config: LlavaConfig | LlavaNextConfig, folder: Path) -> None:
    """Reject settings that a LLaVAR cannot have."""
    where = folder / "config.json"
    if not isinstance(stock_config.vision_feature_layer, int):
        raise ConfigError.at(
            f"{where}:vision_feature_layer",
            f"several layers are not supported (got {stock_config.vision_feature_layer}, expected an integer)",
            "use a LLaVA that projects one hidden state of its tower",
        )
    has_class_token = stock_config.vision_config.model_type == "clip_vision_model"
    if has_class_token and stock_config.vision_feature_select_strategy != "default":
        raise ConfigError.at(
            f"{where}:vision_feature_select_strategy",
            "image features with CLIP's class token are not supported (got 'full', expected 'default')",
            "use a LLaVA that drops the class token",
        )


def _stock_tokenizer(stock_config: LlavaConfig | LlavaNextConfig, folder: Path) -> tuple[PreTrainedTokenizerFast, str]:
    """Return the tokenizer and the image token, whose id the configuration states."""
    tokenizer: Any = load_pretrained(AutoTokenizer, folder)
    if IMAGE_PATCH_TOKEN in tokenizer.get_vocab():
        tokenizer = load_tokenizer(folder)
    image_id = stock_config.image_token_index
    token = tokenizer.convert_ids_to_tokens(image_id)
    is_llavar = IMAGE_PATCH_TOKEN in tokenizer.get_vocab()
    if token is None or token not in tokenizer.get_added_vocab() or (is_llavar and token != IMAGE_PATCH_TOKEN):
        expected = tokenizer.convert_tokens_to_ids(IMAGE_PATCH_TOKEN)
        raise ConfigError.at(
            f"{folder / 'config.json'}:image_token_index",
            f"is not the id of an image token (got {image_id}, which is {token!r} in the tokenizer"
            + (f", expected {expected} for {IMAGE_PATCH_TOKEN})" if is_llavar else ")"),
            "put the tokenizer that the model was saved with into its folder",
        )
    return tokenizer, str(token)


def _stock_template(tokenizer: Any, image_token: str, folder: Path) -> tuple[TemplateName, str | None]:
    """Return the conversation template of a model, and its Jinja template if it is the tokenizer's own."""
    if image_token == IMAGE_PATCH_TOKEN:
        return "llava_v1", None
    own_template = load_pretrained(LlavaProcessor, folder).chat_template or tokenizer.chat_template
    # LLaVA-1.5 was trained with this role; its template in transformers leaves out system prompt and </s>.
    if not isinstance(own_template, str) or "ASSISTANT:" in own_template:
        return "vicuna_v1", None
    adds_bos = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    lacks_bos = adds_bos and "bos_token" not in own_template and tokenizer.bos_token not in own_template
    return "chat", (_BOS if lacks_bos else "") + with_image_parts(own_template)


def _stock_config(parts: ModelParts, activation: str) -> LlavaConfig | LlavaNextConfig:
    """Return the configuration with which stock transformers builds the same model."""
    config, tiles = parts.config, parts.config.tiles
    shared: dict[str, Any] = {
        "text_config": config.text_config,
        "vision_config": config.vision_config,
        "image_token_index": config.image_token_index,
        "image_seq_length": config.image_seq_length,
        "projector_hidden_act": activation,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "multimodal_projector_bias": True,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if tiles is None:
        return LlavaConfig(**shared, architectures=["LlavaForConditionalGeneration"])
    side = config.vision_config.image_size
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
