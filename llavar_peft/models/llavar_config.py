"""The configuration of a LLaVAR: a tower, a language model, one linear projector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from llavar_peft.constants import MODEL_TYPE

# What a flat, released config.json says of the language model, and nothing else is read from it.
_LLAMA_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "vocab_size",
    "rope_theta",
    "rope_scaling",
    "attention_bias",
    "head_dim",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# LLaMA-1's context, which configurations of early 2023 call by this name or leave out.
_OLD_POSITIONS = "max_sequence_length"


class LlavarConfig(LlavaConfig):
    """Configuration of ``LlavarForConditionalGeneration``.

    Everything of ``transformers.LlavaConfig``, with ``image_token_index`` the id of ``<im_patch>``, and:

    Attributes:
        use_im_start_end: Whether images stand between ``<im_start>`` and ``<im_end>``.
        sep_image_conv_front: The original's flag of that name: images go before the first ``USER:``.

    Source: LLaVAR, llava/model/llava.py, ``LlavaConfig`` (there a flat LLaMA configuration).
    """

    model_type = MODEL_TYPE

    use_im_start_end: bool = True
    sep_image_conv_front: bool = False


def llama_config_from_released(flat: Mapping[str, Any]) -> LlamaConfig:
    """Read the language model's part of a released, flat ``config.json``.

    ``AutoConfig`` opens such a file without an error as another model, so it is read field by field here.

    Args:
        flat: The parsed ``config.json``, ``model_type: llava`` with LLaMA's fields at the top level.

    Returns:
        The language model's configuration; absent fields have LLaMA's defaults.
    """
    fields = {name: flat[name] for name in _LLAMA_FIELDS if flat.get(name) is not None}
    if _OLD_POSITIONS in flat and "max_position_embeddings" not in fields:
        fields["max_position_embeddings"] = flat[_OLD_POSITIONS]
    # Vicuna v1.1's file says pad_token_id -1 or 0; the original pads with <unk>, id 0, whatever it says.
    fields["pad_token_id"] = 0
    return LlamaConfig(tie_word_embeddings=False, **fields)


def make_config(
    text_config: LlamaConfig,
    vision_config: CLIPVisionConfig,
    *,
    vocab_size: int,
    image_token_id: int,
    vision_feature_layer: int = -2,
    use_im_start_end: bool = True,
    sep_image_conv_front: bool = False,
) -> LlavarConfig:
    """Composes the configuration from its parts.

    Args:
        text_config: The language model's, before the image tokens were added.
        vision_config: The tower's.
        vocab_size: Number of rows of the embeddings, image tokens included (32003 for LLaVAR).
        image_token_id: Id of ``<im_patch>``.
        vision_feature_layer: Which hidden state of the tower is projected.
        use_im_start_end: Whether images stand between ``<im_start>`` and ``<im_end>``.
        sep_image_conv_front: Whether images go before the first ``USER:``.

    Returns:
        A configuration that ``LlavarForConditionalGeneration`` takes.
    """
    text = LlamaConfig(**{**text_config.to_dict(), "vocab_size": vocab_size, "tie_word_embeddings": False})
    patches = (vision_config.image_size // vision_config.patch_size) ** 2
    return LlavarConfig(
        text_config=text,
        vision_config=vision_config,
        image_token_index=image_token_id,
        image_seq_length=patches,
        projector_hidden_act="linear",
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="default",
        use_im_start_end=use_im_start_end,
        sep_image_conv_front=sep_image_conv_front,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )
