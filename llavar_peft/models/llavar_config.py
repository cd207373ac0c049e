"""The configuration of a LLaVAR, and how it is composed: from parts, or a released file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, LlamaConfig, LlavaConfig, PretrainedConfig

from llavar_peft.constants import MODEL_TYPE, RELEASED_MODEL_TYPE
from llavar_peft.errors import ConfigError
from llavar_peft.models.pretrained_files import make_part_settings, make_settings
from llavar_peft.recipe.resolution import CrossAttention, Tiles, describe_resolution, resolution_from
from llavar_peft.recipe.schema import ProjectorType
from llavar_peft.weights.delta.flat_settings import FLAT_TEMPLATE

# The fields of a flat, released config.json that describe the language model; no other field is read for it.
_LLAMA_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
    "max_position_embeddings", "initializer_range", "rms_norm_eps", "vocab_size", "rope_theta", "rope_scaling",
    "attention_bias", "head_dim", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
# The name of max_position_embeddings in configurations of early 2023.
_OLD_POSITIONS = "max_sequence_length"
_KINDS_IN_LLAVA = {"qwen": "qwen2"}
"""Names of language models in LLaVA's code that are not those of transformers. Source: LLaVA-NeXT, llava_qwen.py."""
_NOT_OF_LANGUAGE_MODEL = {"architectures", "dtype", "model_type", "transformers_version"}

ACTIVATION_OF_PROJECTOR: dict[ProjectorType, str] = {"linear": "linear", "mlp2x_gelu": "gelu"}
"""The configuration's ``projector_hidden_act`` of each kind of projector."""


class LlavarConfig(LlavaConfig):
    """Configuration of ``LlavarForConditionalGeneration``.

    It has all fields of ``transformers.LlavaConfig``, where ``image_token_index`` is the id of ``<im_patch>`` and the
    ``projector_hidden_act`` ``"linear"`` stands for a single layer, and:

    Attributes:
        use_im_start_end: Whether images are enclosed in ``<im_start>`` and ``<im_end>``.
        sep_image_conv_front: The original's flag of that name: images precede the first ``USER:``.
        tuned_vision_tower: Whether the tower was trained, so that it must not be replaced by the original one.
        lm_head_bias: Whether the language model's head has a bias, as that of Phi 2.
        resolution: The settings of ``Tiles`` or ``CrossAttention``; None is the whole image only.
        detail_config: The configuration of the second encoder; None for a model without one apart from the tower.

    Source: LLaVAR, llava/model/llava.py, ``LlavaConfig`` (there a flat LLaMA configuration).
    """

    model_type = MODEL_TYPE

    use_im_start_end: bool = True
    sep_image_conv_front: bool = False
    tuned_vision_tower: bool = False
    lm_head_bias: bool = False
    resolution: dict[str, Any] | None = None
    detail_config: dict[str, Any] | None = None

    @property
    def tiles(self) -> Tiles | None:
        """How images are cut into tiles; None for a model without tiles."""
        found = resolution_from(self.resolution, "config.json:resolution")
        return found if isinstance(found, Tiles) else None

    @property
    def cross_attention(self) -> CrossAttention | None:
        """The second encoder, and its crops; None for a model without cross-attention."""
        found = resolution_from(self.resolution, "config.json:resolution")
        return found if isinstance(found, CrossAttention) else None


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
    resolution: Tiles | CrossAttention | None = None,
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
        resolution: How small letters are read.
    """
    settings = {**text_config.to_dict(), "vocab_size": vocab_size}
    if text_config.model_type == "llama" and not text_config.tie_word_embeddings:
        settings["tie_word_embeddings"] = False
    text = type(text_config)(**settings)
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
        resolution=describe_resolution(resolution),
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
    )


def count_needed_layers(feature_layer: object, layers: int) -> int:
    """Return the number of tower layers to compute for a hidden state; hidden state 0 is the embeddings.

    Args:
        feature_layer: The hidden state, from a file.
        layers: Number of layers of the tower.

    Raises:
        ConfigError: The tower has no such hidden state.
    """
    if type(feature_layer) is not int or not -layers <= feature_layer + 1 <= layers + 1:
        got = ascii(feature_layer)[:80]
        raise ConfigError.at(
            "vision_feature_layer",
            f"no such hidden state (got {got}, expected an integer from {-layers - 1} to {layers})",
            "use -2, as LLaVAR does, or the value the projector was trained with",
        )
    return feature_layer if feature_layer >= 0 else layers + 1 + feature_layer


def read_llama_config(config_json: Mapping[str, Any], folder: Path) -> LlamaConfig:
    """Return the language model's configuration from a parsed ``config.json``.

    A LLaMA's file of transformers 5 is read as it is. Older files and the released, flat ones (``model_type: llava``
    with LLaMA's fields at the top level) are read field by field, because ``AutoConfig`` opens a released file as
    another model without an error. Missing fields have LLaMA's defaults.

    Args:
        config_json: The content of the file.
        folder: Its folder, for messages.

    Raises:
        ConfigError: A value is none that a model can have.
    """
    if config_json.get("model_type") == "llama" and "rope_parameters" in config_json:
        return make_settings(LlamaConfig, config_json, folder)
    fields = {name: config_json[name] for name in _LLAMA_FIELDS if config_json.get(name) is not None}
    if _OLD_POSITIONS in config_json and "max_position_embeddings" not in fields:
        fields["max_position_embeddings"] = config_json[_OLD_POSITIONS]
    # Vicuna v1.1's file has pad_token_id -1 or 0; the original always pads with <unk>, id 0.
    fields["pad_token_id"] = 0
    return make_settings(LlamaConfig, {"tie_word_embeddings": False, **fields}, folder)


def flat_language_kind(config_json: Mapping[str, Any]) -> str:
    """Return the kind of the language model of a flat ``config.json``, by transformers' name: ``llama``, ``mistral``.

    LLaVA's code names it in ``model_type`` (``llava_mistral``) or only in ``architectures``
    (``LlavaMistralForCausalLM``).
    """
    named = str(config_json.get("model_type")).removeprefix(RELEASED_MODEL_TYPE).removeprefix("_")
    if not named:
        listed = config_json.get("architectures")
        first = str(listed[0]) if isinstance(listed, list) and listed else ""
        found = re.fullmatch(r"Llava(\w+)ForCausalLM", first)
        named = found[1].lower() if found else "llama"
    return _KINDS_IN_LLAVA.get(named, named)


def read_flat_text_config(config_json: Mapping[str, Any], folder: Path) -> PretrainedConfig:
    """Return the language model's configuration from a flat ``config.json`` of LLaVA's code.

    Args:
        config_json: The content of the file.
        folder: Its folder, for messages.

    Raises:
        ConfigError: transformers has no such language model, or a value is none that a model can have.
    """
    kind = flat_language_kind(config_json)
    if kind == "llama" and FLAT_TEMPLATE not in config_json:
        return read_llama_config(config_json, folder)
    if kind not in CONFIG_MAPPING or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError.at(
            f"{folder / 'config.json'}:model_type",
            f"a LLaVA with a language model that transformers does not have (got {ascii(kind)[:80]})",
            "use a LLaVA whose language model AutoModelForCausalLM opens, such as LLaMA, Mistral or Qwen 2",
        )
    # LLaVA's own settings stand between those of the language model.
    own = {*CONFIG_MAPPING[kind]().to_dict(), "rope_theta", "rope_scaling"} - _NOT_OF_LANGUAGE_MODEL
    fields = {name: value for name, value in config_json.items() if name in own}
    return make_part_settings({**fields, "model_type": kind}, folder, default=kind)
