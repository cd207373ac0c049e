"""Read a language model from disk: configuration, tensors, and its tokenizer with the image token added."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
)

from llavar_peft.compat.weight_conversion import convert_stored
from llavar_peft.constants import IMAGE_PATCH_TOKEN, IMAGE_PLACEHOLDER, MODEL_TYPE, RELEASED_MODEL_TYPE
from llavar_peft.errors import ConfigError, WeightsError, describe_reason
from llavar_peft.models.chunked_loss import SCALED_LOGITS
from llavar_peft.models.decoder_structure import check_structure, outline
from llavar_peft.models.llama_tokenizer import add_image_tokens, load_tokenizer
from llavar_peft.models.llavar_config import read_llama_config
from llavar_peft.models.pretrained_files import load_pretrained, with_defaults
from llavar_peft.recipe.schema import ModelConfig
from llavar_peft.types import TemplateName
from llavar_peft.weights.delta.released_layout import check_not_delta, is_language_model, read_model_config
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.joined_rows import JoinedRows, mean_row
from llavar_peft.weights.io.tensor_blocks import open_weights
from llavar_peft.weights.io.tensor_table import DOWNLOAD_AGAIN

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

_TWO_TOWERS = ("clip", "siglip", "siglip2", "chinese_clip", "altclip", "metaclip_2")
"""Models of an image tower and a text tower, which are compared and answer nothing."""


@dataclass(frozen=True, kw_only=True)
class LanguageParts:
    """A language model on disk, with the image token.

    Attributes:
        config: Its configuration, with the number of embedding rows that it has on disk.
        tensors: Its tensors by our names, with rows for the image token. A tied head is absent.
        tokenizer: With the image token.
        template: How conversations are written for it.
        image_token: The token at the positions of images.
        use_im_start_end: Whether ``<im_start>`` and ``<im_end>`` enclose an image.
        rows: Number of rows of the embeddings.
    """

    config: PretrainedConfig
    tensors: dict[str, Tensor | JoinedRows]
    tokenizer: PreTrainedTokenizerFast
    template: TemplateName
    image_token: str
    use_im_start_end: bool
    rows: int


def read_language_model(folder: Path, settings: ModelConfig) -> LanguageParts:
    """Read a language model.

    New embedding rows are initialized with the mean of the old ones. Where the embeddings have spare rows, as many
    models do, the image token takes one of these.

    Args:
        folder: Holds ``config.json``, weights and tokenizer.
        settings: With ``template`` and ``use_im_start_end``.

    Raises:
        ConfigError: The folder holds no language model of a supported kind, or no template fits it.
        WeightsError: A file cannot be read, or the tokenizer does not belong to the weights.
    """
    config_json = read_model_config(folder)
    _check_model_type(config_json, folder)
    template = _choose_template(folder, config_json, settings)
    # LLaVAR's own template has image tokens of its own, which follow the tokenizer's, and an untied head.
    is_llava_v1 = template == "llava_v1"
    if is_llava_v1 and config_json["model_type"] == "llama":
        config: PretrainedConfig = read_llama_config(config_json, folder)
    else:
        config = _read_config(folder)
    tokenizer = _load_tokenizer(folder, config_json, template)
    old_size = len(tokenizer)
    use_im_start_end = is_llava_v1 and settings.use_im_start_end is not False
    if is_llava_v1:
        add_image_tokens(tokenizer, use_im_start_end=use_im_start_end)
    else:
        check_fast(tokenizer, folder)
        add_placeholder(tokenizer)
    tied = bool(config.tie_word_embeddings) and not is_llava_v1
    stored = _open_renamed(folder, config)
    embeddings = tensor_names.find_embeddings(stored)
    check_not_delta(stored.get(tensor_names.FINAL_NORM), folder, config_json)
    if tied:
        stored.pop(tensor_names.HEAD, None)
    elif tensor_names.HEAD not in stored and config.tie_word_embeddings and embeddings in stored:
        stored[tensor_names.HEAD] = stored[embeddings]
    config.tie_word_embeddings = tied
    rows = _number_of_rows(stored, old_size, len(tokenizer), folder, keep_spare=not is_llava_v1)
    tensors: dict[str, Tensor | JoinedRows] = {**stored}
    for name in (embeddings, tensor_names.HEAD):
        if name in stored:
            # LLaVAR's rows follow those of the tokenizer, also where the embeddings have more.
            tensors[name] = with_mean_rows(stored[name][:old_size] if is_llava_v1 else stored[name], rows)
    if tensor_names.HEAD_BIAS in stored:
        bias = stored[tensor_names.HEAD_BIAS]
        tensors[tensor_names.HEAD_BIAS] = torch.cat([bias, bias.mean().expand(rows - len(bias))])
    return LanguageParts(
        config=config,
        tensors=tensors,
        tokenizer=tokenizer,
        template=template,
        image_token=IMAGE_PATCH_TOKEN if is_llava_v1 else IMAGE_PLACEHOLDER,
        use_im_start_end=use_im_start_end,
        rows=rows,
    )


def _load_tokenizer(folder: Path, config_json: Mapping[str, Any], template: TemplateName) -> PreTrainedTokenizerFast:
    # transformers 5 converts LLaMA's tokenizer.model into a tokenizer with other ids, which were not trained.
    has_model = config_json.get("model_type") == "llama" and (folder / "tokenizer.model").is_file()
    if template == "llava_v1" or (template == "vicuna_v1" and has_model):
        return load_tokenizer(folder)
    return load_pretrained(AutoTokenizer, folder)


def add_placeholder(tokenizer: PreTrainedTokenizerFast) -> None:
    """Add ``<image>`` as a special token, in place. Text next to it keeps its white space, as in stock LLaVA."""
    from tokenizers import AddedToken

    token: Any = AddedToken(IMAGE_PLACEHOLDER, normalized=False, special=True)
    if IMAGE_PLACEHOLDER not in tokenizer.get_vocab():
        tokenizer.add_tokens([token], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def _check_model_type(config_json: Mapping[str, Any], folder: Path) -> None:
    """Reject what is no language model."""
    model_type = config_json.get("model_type")
    if model_type in _TWO_TOWERS:
        raise ConfigError.at(
            "model.language_model",
            f"{folder} is a vision tower (got {model_type!r}), expected a language model",
            "set vision_tower to it, and language_model to the folder of a language model",
        )
    if not is_language_model(config_json) or "vision_config" in config_json:
        readable = model_type in (MODEL_TYPE, RELEASED_MODEL_TYPE) or "vision_config" not in config_json
        alternative = "set checkpoint instead of language_model, or " if readable else ""
        raise ConfigError.at(
            "model.language_model",
            f"{folder} is a complete vision-language model (got {model_type!r}), expected a language model",
            f"{alternative}give the folder of the language model it was made from",
        )
    if with_defaults(config_json, folder).get("is_encoder_decoder"):
        raise ConfigError.at(
            f"{folder / 'config.json'}:model_type",
            f"a model with an encoder and a decoder (got {model_type!r}, expected a decoder)",
            "give the folder of a language model such as Vicuna, Llama, Qwen or Mistral",
        )


def _read_config(folder: Path) -> PretrainedConfig:
    """Read the configuration of a language model, and check that its modules can be those of a LLaVAR."""
    config = load_pretrained(AutoConfig, folder)
    # Some encoders, such as BERT, can be used as decoders; they were not trained as such.
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        raise ConfigError.at(
            f"{folder / 'config.json'}:model_type",
            f"not a language model that transformers can continue a text with (got {config.model_type!r})",
            "give the folder of a language model such as Vicuna, Llama, Qwen or Mistral",
        )
    scaled = [name for name in SCALED_LOGITS if getattr(config, name, None) not in (None, 1, 1.0)]
    if not all(isinstance(value := getattr(config, name), float | int) and value > 0 for name in scaled):
        raise ConfigError.at(
            f"{folder / 'config.json'}:{scaled[0]}",
            f"how {config.model_type!r} scales its logits is not known (got {getattr(config, scaled[0])})",
            "give a language model without this setting",
        )
    check_structure(outline(config, folder), folder)
    return config


def read_converted(folder: Path) -> dict[str, Tensor] | None:
    """Read a language model whose file has other names or forms of tensors than transformers' modules.

    Args:
        folder: Holds ``config.json`` and weights.

    Returns:
        Its tensors by our names; None where LLaMA's names suffice, so that the file can be streamed.

    Raises:
        ConfigError: The folder holds no language model.
        WeightsError: A file cannot be read.
    """
    stored = open_weights(folder)
    converted = _open_renamed(folder, load_pretrained(AutoConfig, folder))
    renamed = {tensor_names.from_released(name) for name in stored} - {None}
    return None if renamed == converted.keys() else converted


def _open_renamed(folder: Path, config: PretrainedConfig) -> dict[str, Tensor]:
    """Return a language model's tensors by our names, in the form that transformers' modules have."""
    stored = open_weights(folder)
    if config.model_type == "llama":
        return {our_name: tensor for name, tensor in stored.items() if (our_name := tensor_names.from_released(name))}
    model = outline(config, folder)
    try:
        converted = convert_stored(model, stored)
    except Exception as error:  # tensors of other shapes or numbers than the model's, in whatever operation fails
        raise WeightsError.at(
            str(folder),
            f"its tensors are not those of a {config.model_type!r} ({type(error).__name__}: {describe_reason(error)})",
            DOWNLOAD_AGAIN,
        ) from error
    base = f"{model.base_model_prefix}."
    head_module = model.get_output_embeddings()
    head = next((name for name, module in model.named_modules() if module is head_module), "lm_head")
    tensors: dict[str, Tensor] = {}
    for name, tensor in converted.items():
        if name.startswith(base):
            tensors[f"model.language_model.{name.removeprefix(base)}"] = tensor
        elif name.startswith(f"{head}."):
            tensors[f"lm_head.{name.removeprefix(f'{head}.')}"] = tensor
        elif (our_name := tensor_names.from_released(name)) is not None:
            tensors[our_name] = tensor
    return {name: tensor for name, tensor in tensors.items() if tensor_names.from_released(name) is not None}


def _choose_template(folder: Path, config_json: Mapping[str, Any], settings: ModelConfig) -> TemplateName:
    """Return the template that is set, or the one that fits the language model."""
    if settings.template is not None:
        return settings.template
    if config_json.get("model_type") == "llama" and (folder / "tokenizer.model").is_file():
        return "llava_v1"
    tokenizer: Any = load_pretrained(AutoTokenizer, folder)
    if tokenizer.chat_template is not None:
        return "chat"
    if config_json.get("model_type") == "llama":
        return "llava_v1"
    raise ConfigError.at(
        "model.template",
        f"not set, and the tokenizer of {folder} brings no chat template",
        "set it to vicuna_v1, or give a language model that was tuned for chats",
    )


def check_fast(tokenizer: Any, folder: Path) -> None:
    """Reject a slow tokenizer, which does not tell where its tokens stand in a text.

    Raises:
        ConfigError: Names the tokenizer's class.
    """
    if not tokenizer.is_fast:
        raise ConfigError.at(
            str(folder),
            f"wrong kind of tokenizer (got {type(tokenizer).__name__}, expected a fast one)",
            "put the model's tokenizer.json into the folder",
        )


def _number_of_rows(stored: Mapping[str, Tensor], old_size: int, size: int, folder: Path, *, keep_spare: bool) -> int:
    """Return the number of rows that the embeddings get.

    Args:
        stored: The tensors on disk.
        old_size: Number of tokens before the image tokens were added.
        size: Number of tokens with them.
        folder: The model's folder, for messages.
        keep_spare: Whether rows beyond the tokens are kept.
    """
    embeddings = tensor_names.find_embeddings(stored)
    rows = stored[embeddings].shape[0] if embeddings in stored else size
    if rows < old_size:
        raise WeightsError.at(
            f"{folder}:{embeddings}",
            f"too few rows for the tokenizer (got {rows}, expected at least {old_size})",
            "put this model's own tokenizer into its folder",
        )
    return max(rows, size) if keep_spare else size


def with_mean_rows(stored: Tensor, rows: int) -> Tensor | JoinedRows:
    """Return embeddings with at least this number of rows; the new ones are the mean of the others."""
    missing = rows - len(stored)
    return JoinedRows(stored, mean_row(stored).expand(missing, -1)) if missing > 0 else stored
