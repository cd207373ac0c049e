"""A LLaVAR as stock ``transformers`` has it: read, and written with all that it needs to run without this package."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import LlavaConfig, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from llavar_peft.atomic_files import write_json
from llavar_peft.constants import IMAGE_PATCH_TOKEN, IMAGE_PLACEHOLDER, IMAGE_START_TOKEN
from llavar_peft.data.conversation_template import CHAT_TEMPLATE, image_block
from llavar_peft.errors import ConfigError
from llavar_peft.models.llama_tokenizer import load_tokenizer
from llavar_peft.models.llavar_config import make_config
from llavar_peft.models.model_parts import Parts
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.convert_layout import to_one_layer
from llavar_peft.weights.io.tensor_blocks import open_weights

logger = logging.getLogger(__name__)


def stock_config(parts: Parts, activation: str) -> LlavaConfig:
    """The configuration of the same model for ``transformers.LlavaForConditionalGeneration``.

    Args:
        parts: The model's.
        activation: Between the projector's two layers.

    Returns:
        Stock LLaVA's configuration.
    """
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


def stock_chat_template(parts: Parts) -> str:
    """The conversation's template, with the ``<s>`` that stock processors do not add, and images as they expand them.

    A stock processor replaces each ``<im_patch>`` by as many as the tower has patches.
    """
    block = image_block(1, use_im_start_end=parts.config.use_im_start_end)
    return "{{- bos_token -}}\n" + CHAT_TEMPLATE.replace(IMAGE_PLACEHOLDER, block)


def write_stock_companions(parts: Parts, activation: str, dtype: str | None, staged: Path) -> None:
    """Write configuration, generation settings and processor.

    Args:
        parts: The model's.
        activation: Between the projector's two layers.
        dtype: Of the weights, by torch's name; None where they keep their own.
        staged: The folder.
    """
    if parts.inference_image_mode != "pad":
        logger.warning("pictures will be padded; %s is not known to stock LLaVA", parts.inference_image_mode)
    config = stock_config(parts, activation)
    described = {**config.to_diff_dict(), **({"dtype": dtype} if dtype is not None else {})}
    write_json(staged / "config.json", described)
    tokenizer = parts.tokenizer
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    write_json(staged / "generation_config.json", ids)
    clip = parts.image_processor
    images = LlavaImageProcessorPil(
        do_pad=True,
        size=clip.size,
        crop_size=clip.crop_size,
        resample=clip.resample,
        rescale_factor=clip.rescale_factor,
        image_mean=clip.image_mean,
        image_std=clip.image_std,
    )
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=parts.config.vision_config.patch_size,
        vision_feature_select_strategy=parts.config.vision_feature_select_strategy,
        chat_template=stock_chat_template(parts),
        image_token=IMAGE_PATCH_TOKEN,
        num_additional_image_tokens=1,  # the class token, which the strategy "default" takes away again
    ).save_pretrained(str(staged))


def read_stock(folder: Path) -> Parts:
    """Read a LLaVAR in the layout of ``transformers.LlavaForConditionalGeneration``, as ``export`` writes it.

    Args:
        folder: With ``config.json``, weights, tokenizer and processor.

    Returns:
        Its parts; the projector as the one layer that it is.

    Raises:
        ConfigError: Another LLaVA: its image token is not ``<im_patch>``.
        WeightsError: A projector that is not linear, or a file that cannot be read.
    """
    described = LlavaConfig.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    use_im_start_end = IMAGE_START_TOKEN in tokenizer.get_vocab()
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_PATCH_TOKEN)
    if image_id != described.image_token_index:
        raise ConfigError.at(
            f"{folder / 'config.json'}:image_token_index",
            f"is not {IMAGE_PATCH_TOKEN} (got {described.image_token_index}, the tokenizer says {image_id})",
            "give a LLaVAR; other LLaVAs stay with stock transformers",
        )
    whole = make_config(
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
    return Parts(
        source=str(folder),
        config=whole,
        tensors=tensors,
        tokenizer=tokenizer,
        image_processor=_clip_processor(LlavaImageProcessorPil.from_pretrained(folder)),
        image_mode="pad",
        inference_image_mode="pad",
    )


def _clip_processor(stock: LlavaImageProcessorPil) -> CLIPImageProcessorPil:
    """CLIP's, of the same sizes: how images are padded is the processor's own affair."""
    return CLIPImageProcessorPil(
        size=stock.size,
        crop_size=stock.crop_size,
        resample=stock.resample,
        rescale_factor=stock.rescale_factor,
        image_mean=stock.image_mean,
        image_std=stock.image_std,
    )
