"""A LLaVAR in the layout of stock ``transformers`` LLaVA: read it, and write the files it needs besides its weights."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaImageProcessorPil, LlavaProcessor

from llavar_peft.atomic_files import write_json
from llavar_peft.constants import IMAGE_PATCH_TOKEN, IMAGE_PLACEHOLDER, IMAGE_START_TOKEN
from llavar_peft.data.conversation_template import CHAT_TEMPLATE, image_block
from llavar_peft.errors import ConfigError
from llavar_peft.models.llama_tokenizer import load_tokenizer
from llavar_peft.models.llavar_config import make_config
from llavar_peft.models.model_parts import ModelParts
from llavar_peft.models.pretrained_files import load_pretrained
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.convert_layout import to_one_layer
from llavar_peft.weights.io.tensor_blocks import open_weights

logger = logging.getLogger(__name__)

# The settings that CLIP's and LLaVA's image processors share.
_SHARED_IMAGE_SETTINGS = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")


def write_stock_companions(parts: ModelParts, activation: str, dtype: str | None, staged: Path) -> None:
    """Write the configuration, generation settings and processor of the stock layout into a folder.

    Args:
        activation: Name of the activation between the projector's two layers.
        dtype: Of the weights, by torch's name; None if each tensor keeps its own.
    """
    if parts.inference_image_mode != "pad":
        logger.warning(
            "images will be padded with the mean color: stock LLaVA does not support the mode %s",
            parts.inference_image_mode,
        )
    config = _stock_config(parts, activation)
    write_json(staged / "config.json", {**config.to_diff_dict(), **({"dtype": dtype} if dtype is not None else {})})
    tokenizer = parts.tokenizer
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    write_json(staged / "generation_config.json", ids)
    images = LlavaImageProcessorPil(
        do_pad=True, **{name: getattr(parts.image_processor, name) for name in _SHARED_IMAGE_SETTINGS}
    )
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=parts.config.vision_config.patch_size,
        vision_feature_select_strategy=parts.config.vision_feature_select_strategy,
        chat_template=_stock_chat_template(parts),
        image_token=IMAGE_PATCH_TOKEN,
        num_additional_image_tokens=1,  # the class token, which the strategy "default" removes again
    ).save_pretrained(str(staged))


def read_stock(folder: Path) -> ModelParts:
    """Read a LLaVAR in the layout of ``transformers.LlavaForConditionalGeneration``, as ``export`` writes it.

    Returns:
        Its parts, with the projector as a single linear layer.

    Raises:
        ConfigError: Another LLaVA, whose image token is not ``<im_patch>``.
        WeightsError: The projector is not linear, or a file cannot be read.
    """
    described = load_pretrained(LlavaConfig, folder)
    tokenizer = load_tokenizer(folder)
    use_im_start_end = IMAGE_START_TOKEN in tokenizer.get_vocab()
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_PATCH_TOKEN)
    if image_id != described.image_token_index:
        raise ConfigError.at(
            f"{folder / 'config.json'}:image_token_index",
            f"is not the id of {IMAGE_PATCH_TOKEN} (got {described.image_token_index}, expected {image_id} as in the "
            f"tokenizer)",
            "give a LLaVAR; use stock transformers for other LLaVA models",
        )
    config = make_config(
        described.text_config,
        described.vision_config,
        vocab_size=described.text_config.vocab_size,
        image_token_id=described.image_token_index,
        vision_feature_layer=described.vision_feature_layer,
        use_im_start_end=use_im_start_end,
    )
    tensors = {ours: tensor for name, tensor in open_weights(folder).items() if (ours := tensor_names.from_stock(name))}
    weight, bias = to_one_layer(tensors, described.projector_hidden_act, str(folder))
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(tensor_names.STOCK_PROJECTOR)}
    tensors.update({tensor_names.PROJECTOR_WEIGHT: weight, tensor_names.PROJECTOR_BIAS: bias})
    images = load_pretrained(LlavaImageProcessorPil, folder)
    return ModelParts(
        source=str(folder),
        config=config,
        tensors={**tensors},
        tokenizer=tokenizer,
        # How images are padded is decided by LlavarProcessor.
        image_processor=CLIPImageProcessorPil(**{name: getattr(images, name) for name in _SHARED_IMAGE_SETTINGS}),
        image_mode="pad",
        inference_image_mode="pad",
    )


def _stock_config(parts: ModelParts, activation: str) -> LlavaConfig:
    ours = parts.config
    config = LlavaConfig(
        text_config=ours.text_config,
        vision_config=ours.vision_config,
        image_token_index=ours.image_token_index,
        image_seq_length=ours.image_seq_length,
        projector_hidden_act=activation,
        vision_feature_layer=ours.vision_feature_layer,
        vision_feature_select_strategy=ours.vision_feature_select_strategy,
        multimodal_projector_bias=True,
        tie_word_embeddings=False,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    return config


def _stock_chat_template(parts: ModelParts) -> str:
    """Return the conversation template for a stock processor.

    It writes the ``<s>`` that a stock processor does not add, and one ``<im_patch>`` per image, which a stock processor
    repeats for each patch of the tower.
    """
    block = image_block(1, use_im_start_end=parts.config.use_im_start_end)
    return "{{- bos_token -}}\n" + CHAT_TEMPLATE.replace(IMAGE_PLACEHOLDER, block)
