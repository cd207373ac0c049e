"""The configuration of a LLaVAR, and how it is composed: from parts, or a released file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlavaConfig, PretrainedConfig

from llavar_peft.constants import MODEL_TYPE
from llavar_peft.models.pretrained_files import make_settings
from llavar_peft.recipe.schema import ProjectorType

# The fields of a flat, released config.json that describe the language model; no other field is read for it.
_LLAMA_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "vocab_size", "rope_theta", "rope_scaling",
    "attention_bias", "head_dim", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
# The name of max_position_embeddings in configurations of early 2023.
_OLD_POSITIONS = "max_sequence_length"

ACTIVATION_OF_PROJECTOR: dict[ProjectorType, str] = {"linear": "linear", "mlp2x_gelu": "gelu"}
"""The configuration's ``projector_hidden_act`` of each kind of projector."""


class LlavarConfig(LlavaConfig):
    """Configuration of ``LlavarForConditionalGeneration``.

    It has all fields of ``transformers.LlavaConfig``, where ``image_token_index`` is the id of ``<im_patch>`` and the
    ``projector_hidden_act`` ``"linear"`` stands for a single layer, and:

    Attributes:
        use_im_start_end: Whether images are enclosed in ``<im_start>`` and ``<im_end>``.
        sep_image_conv_front: The original's flag of that name: images precede the first ``USER:``.

    Source: LLaVAR, llava/model/llava.py, ``LlavaConfig`` (there a flat LLaMA configuration).
    """

    model_type = MODEL_TYPE

    use_im_start_end: bool = True
    sep_image_conv_front: bool = False


def make_config(  # noqa: PLR0913 - the settings of a model
    text_config: PretrainedConfig,
    vision_config: PretrainedConfig,
    *,
    vocab_size: int,
    image_token_id: int,
    vision_feature_layer: int = -2,
    use_im_start_end: bool = True,
    sep_image_conv_front: bool = False,
    image_side: int | None = None,
    extra_positions: int = 1,
    projector_type: ProjectorType = "linear",
) -> LlavarConfig:
    """Compose the configuration from those of the language model and the vision tower.

    Args:
        text_config: The language model's, before the image tokens were added.
        vocab_size: Number of rows of the embeddings, image tokens included (32003 for LLaVAR).
        image_token_id: Id of ``<im_patch>``.
        vision_feature_layer: The tower's hidden state that is projected.
        image_side: Side of a prepared image in pixels; None is the tower's ``image_size``.
        extra_positions: Number of positions of the tower that are no patches.
        projector_type: Kind of projector.
    """
    described = {**text_config.to_dict(), "vocab_size": vocab_size}
    if text_config.model_type == "llama" and not text_config.tie_word_embeddings:
        described["tie_word_embeddings"] = False
    text = type(text_config)(**described)
    return LlavarConfig(
        text_config=text,
        vision_config=vision_config,
        image_token_index=image_token_id,
        image_seq_length=((image_side or vision_config.image_size) // vision_config.patch_size) ** 2,
        projector_hidden_act=ACTIVATION_OF_PROJECTOR[projector_type],
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy="default" if extra_positions else "full",
        use_im_start_end=use_im_start_end,
        sep_image_conv_front=sep_image_conv_front,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )


def read_llama_config(described: Mapping[str, Any], folder: Path) -> LlamaConfig:
    """Return the language model's configuration from a parsed ``config.json``.

    A LLaMA's file of transformers 5 is read as it is. Older files and the released, flat ones (``model_type: llava``
    with LLaMA's fields at the top level) are read field by field, because ``AutoConfig`` opens a released file as
    another model without an error. Missing fields have LLaMA's defaults.

    Args:
        described: The file.
        folder: Its folder, for messages.

    Raises:
        ConfigError: A value is none that a model can have.
    """
    if described.get("model_type") == "llama" and "rope_parameters" in described:
        return make_settings(LlamaConfig, described, folder)
    fields = {name: described[name] for name in _LLAMA_FIELDS if described.get(name) is not None}
    if _OLD_POSITIONS in described and "max_position_embeddings" not in fields:
        fields["max_position_embeddings"] = described[_OLD_POSITIONS]
    # Vicuna v1.1's file has pad_token_id -1 or 0; the original always pads with <unk>, id 0.
    fields["pad_token_id"] = 0
    return make_settings(LlamaConfig, {"tie_word_embeddings": False, **fields}, folder)
