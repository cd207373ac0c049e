"""Read a model's parts from disk: a language model and a tower, or a checkpoint in one of three layouts.

Each reader returns ``ModelParts``: configuration, tensors under this package's names (mapped lazily from disk),
tokenizer and image processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from llavar_peft.constants import MODEL_TYPE, RELEASED_MODEL_TYPE, STOCK_MODEL_TYPES, TUNED_TOWER
from llavar_peft.errors import ConfigError
from llavar_peft.models.flat_layout import check_flat, is_flat, read_flat
from llavar_peft.models.hf_llava import read_stock
from llavar_peft.models.language_model_loading import read_language_model
from llavar_peft.models.llavar_config import LlavarConfig, make_config
from llavar_peft.models.model_parts import ModelParts
from llavar_peft.models.model_resolution import set_resolution
from llavar_peft.models.pretrained_files import load_pretrained
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.models.quantized_checkpoint import check_same_quantization
from llavar_peft.models.tower_loading import TowerParts, read_tower
from llavar_peft.recipe.resolution import resolution_from
from llavar_peft.recipe.schema import ModelConfig, ProjectorType
from llavar_peft.weights.adapter.adapter_files import ADAPTER_CONFIG
from llavar_peft.weights.adapter.adapter_layouts import conversion_of, is_llava_lora
from llavar_peft.weights.delta.released_layout import check_not_delta, read_model_config
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.companion_files import PROCESSOR_FILE
from llavar_peft.weights.io.hub_folders import resolve_folder
from llavar_peft.weights.io.joined_rows import JoinedRows
from llavar_peft.weights.io.quantized_weights import stored_quantization
from llavar_peft.weights.io.stated_resolution import RESOLUTION
from llavar_peft.weights.io.tensor_blocks import open_weights
from llavar_peft.weights.io.tensor_table import WEIGHTS_FILES

if TYPE_CHECKING:
    from torch import Tensor

_CLIP = ("clip", "clip_vision_model")


def read_parts(config: ModelConfig, *, seed: int) -> ModelParts:
    """Read a language model and a vision tower, and draw a new projector.

    New embedding rows are initialized with the mean of the old ones, the projector as ``torch.nn.Linear`` is.

    Args:
        config: With ``language_model`` and ``vision_tower``.
        seed: Of the projector's random weights.

    Raises:
        ConfigError: A folder does not hold the model that its setting names.
        WeightsError: A file cannot be read.
    """
    folder = resolve_folder(_required(config.language_model), "model.language_model")
    language = read_language_model(folder, config)
    tower = _read_tower(_required(config.vision_tower))
    model_config = make_config(
        language.config,
        tower.config,
        vocab_size=language.rows,
        image_token_id=int(language.tokenizer.convert_tokens_to_ids(language.image_token)),
        vision_feature_layer=config.vision_feature_layer,
        use_im_start_end=language.use_im_start_end,
        image_side=tower.side,
        extra_positions=tower.extra_positions,
        projector_type=config.projector_type,
    )
    model_config.lm_head_bias = tensor_names.HEAD_BIAS in language.tensors
    widths = (tower.config.hidden_size, language.config.hidden_size)
    parts = ModelParts(
        source=str(folder),
        config=model_config,
        tensors={**language.tensors, **tower.tensors, **_draw_projector(*widths, config.projector_type, seed)},
        tokenizer=language.tokenizer,
        image_processor=tower.image_processor,
        image_mode=config.image_mode,
        inference_image_mode=config.image_mode,
        template=language.template,
        image_token=language.image_token,
    )
    return set_resolution(parts, config.resolution, seed=seed)


def read_checkpoint(config: ModelConfig, *, seed: int = 0) -> ModelParts:
    """Read a checkpoint in this package's layout, in the released layout with a separate tower, or a stock LLaVA.

    Args:
        config: With ``checkpoint``, and ``vision_tower`` for the released layout.
        seed: Of the random weights of a resolution that the checkpoint does not have.

    Raises:
        ConfigError: The folder has none of these layouts; or the tower is not given, or would replace a trained one.
        WeightsError: A file cannot be read.
    """
    folder = resolve_folder(_required(config.checkpoint), "model.checkpoint")
    if (folder / ADAPTER_CONFIG).is_file() and not any((folder / name).is_file() for name in WEIGHTS_FILES):
        raise ConfigError.at(
            str(folder),
            "an adapter, expected a complete model",
            conversion_of(folder)
            if is_llava_lora(folder)
            else "give it as the adapter of its base, or merge it first with `llavar-peft merge`",
        )
    config_json = read_model_config(folder)
    model_type = config_json.get("model_type")
    if config_json.get(TUNED_TOWER) and config.vision_tower is not None:
        raise ConfigError.at(
            "model.vision_tower",
            f"set (to {config.vision_tower!r}) for a checkpoint whose own vision tower was trained",
            "leave it out: the checkpoint contains its tower",
        )
    if model_type == MODEL_TYPE:
        return set_resolution(_read_own_layout(folder, config), config.resolution, seed=seed)
    if is_flat(config_json):
        return set_resolution(_read_released_layout(folder, config_json, config), config.resolution, seed=seed)
    if model_type in STOCK_MODEL_TYPES:
        return set_resolution(read_stock(folder), config.resolution, seed=seed)
    raise ConfigError.at(
        f"{folder / 'config.json'}:model_type",
        f"not a LLaVAR (got {model_type!r}, expected {MODEL_TYPE!r}, or {RELEASED_MODEL_TYPE!r} with LLaMA's fields)",
        _fix_for_type(model_type),
    )


def _read_own_layout(folder: Path, config: ModelConfig) -> ModelParts:
    """Read a checkpoint that this package wrote, with another vision tower if ``config`` names one."""
    model_config = load_pretrained(LlavarConfig, folder)
    quantize = stored_quantization(read_model_config(folder), folder)
    check_same_quantization(quantize, config.quantize, folder)
    resolution_from(model_config.resolution, f"{folder / 'config.json'}:{RESOLUTION}")
    processor = load_pretrained(LlavarProcessor, folder)
    if processor.resolution != model_config.resolution:
        raise ConfigError.at(
            f"{folder / PROCESSOR_FILE}:{RESOLUTION}",
            f"not that of config.json (got {ascii(processor.resolution)[:120]}, expected "
            f"{ascii(model_config.resolution)[:120]})",
            "copy both files from the model's original folder",
        )
    stored = open_weights(folder)
    check_not_delta(stored.get(tensor_names.FINAL_NORM), folder, model_config.to_dict())
    tensors: dict[str, Tensor | JoinedRows] = {**stored}
    image_processor = processor.image_processor
    if config.vision_tower is not None:
        tower = _read_tower(config.vision_tower)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(tensor_names.TOWER)}
        tensors.update(tower.tensors)
        model_config.vision_config, image_processor = tower.config, tower.image_processor
    return ModelParts(
        source=str(folder),
        config=model_config,
        tensors=tensors,
        tokenizer=processor.tokenizer,
        image_processor=image_processor,
        image_mode=processor.image_mode,
        inference_image_mode=processor.inference_image_mode,
        template=processor.template,
        image_token=processor.image_token,
        chat_template=processor.chat_template,
        detail_settings=processor.detail_settings,
        quantize=quantize,
    )


def _read_released_layout(folder: Path, config_json: Mapping[str, Any], config: ModelConfig) -> ModelParts:
    check_flat(folder, config_json, config.vision_tower)
    return read_flat(folder, config_json, config, _read_tower(_required(config.vision_tower)))


def _fix_for_type(model_type: object) -> str:
    """Return what to do with a folder of another kind of model."""
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if known and CONFIG_MAPPING[model_type] in MODEL_FOR_CAUSAL_LM_MAPPING:
        return (
            "a plain language model sees no images: train a LLaVAR from it, with a recipe's model.language_model and "
            "model.vision_tower"
        )
    if model_type in _CLIP:
        return "give a LLaVAR as the model, and this folder as its vision tower"
    return "give the folder of a LLaVAR"


def _read_tower(name: str) -> TowerParts:
    return read_tower(resolve_folder(name, "model.vision_tower"))


def _draw_projector(width_in: int, width_out: int, projector_type: ProjectorType, seed: int) -> dict[str, Tensor]:
    """Draw a projector as ``torch.nn.Linear`` is initialized, weight before bias, the first layer first."""
    generator = torch.Generator().manual_seed(seed)

    def draw(width: int, *shape: int) -> Tensor:
        values: Tensor = (torch.rand(*shape, generator=generator) * 2 - 1) * width**-0.5
        return values

    layers = {"": width_in} if projector_type == "linear" else {"linear_1.": width_in, "linear_2.": width_out}
    tensors: dict[str, Tensor] = {}
    for layer, width in layers.items():
        tensors[f"{tensor_names.PROJECTOR}{layer}weight"] = draw(width, width_out, width)
        tensors[f"{tensor_names.PROJECTOR}{layer}bias"] = draw(width, width_out)
    return tensors


def _required(name: str | None) -> str:
    """Return a folder or hub name that a setting has to give."""
    if name is None:
        raise ConfigError.at("model", "no model is given", "set language_model and vision_tower, or checkpoint")
    return name
