"""Read a model's parts from disk: a language model and a tower, or a checkpoint in one of three layouts.

Each reader returns ``ModelParts``: configuration, tensors under this package's names (mapped lazily from disk),
tokenizer and image processor.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig

from llavar_peft.constants import IMAGE_PATCH_TOKEN, MODEL_TYPE, RELEASED_MODEL_TYPE
from llavar_peft.errors import ConfigError, EnvironmentFaultError, WeightsError
from llavar_peft.models.hf_llava import read_stock
from llavar_peft.models.llama_tokenizer import add_image_tokens, load_tokenizer
from llavar_peft.models.llavar_config import LlavarConfig, make_config, read_llama_config
from llavar_peft.models.model_parts import ModelParts
from llavar_peft.models.pretrained_files import load_pretrained
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.recipe.schema import ModelConfig
from llavar_peft.weights.adapter.adapter_files import ADAPTER_CONFIG
from llavar_peft.weights.delta.released_layout import check_not_delta, read_model_config
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.joined_rows import JoinedRows, mean_row
from llavar_peft.weights.io.tensor_blocks import open_weights
from llavar_peft.weights.io.tensor_table import WEIGHTS_FILES

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

_HUB_FILES = ["*.json", "*.safetensors", "*.bin", "tokenizer.model"]


def read_parts(config: ModelConfig, *, seed: int) -> ModelParts:
    """Read a LLaMA or Vicuna and a CLIP tower, and draw a new projector.

    New embedding rows are initialized with the mean of the old ones, the projector as ``torch.nn.Linear`` is.

    Args:
        config: With ``language_model`` and ``vision_tower``.
        seed: Of the projector's random weights.

    Raises:
        ConfigError: A folder does not hold the model that its setting names.
        WeightsError: A file cannot be read.
    """
    language = resolve_folder(_required(config.language_model), "model.language_model")
    text = _read_language_config(language)
    tokenizer = load_tokenizer(language)
    old_size = len(tokenizer)
    add_image_tokens(tokenizer, use_im_start_end=config.use_im_start_end)
    tower, tower_tensors, image_processor = _read_tower(_required(config.vision_tower))
    model_config = make_config(
        text,
        tower,
        vocab_size=len(tokenizer),
        image_token_id=int(tokenizer.convert_tokens_to_ids(IMAGE_PATCH_TOKEN)),
        vision_feature_layer=config.vision_feature_layer,
        use_im_start_end=config.use_im_start_end,
    )
    stored = _rename_released(open_weights(language))
    check_not_delta(stored.get(tensor_names.FINAL_NORM), language)
    if tensor_names.HEAD not in stored and text.tie_word_embeddings and tensor_names.EMBEDDINGS in stored:
        stored[tensor_names.HEAD] = stored[tensor_names.EMBEDDINGS]
    tensors: dict[str, Tensor | JoinedRows] = {**stored}
    for name in (tensor_names.EMBEDDINGS, tensor_names.HEAD):
        if name in stored:
            tensors[name] = _extend_with_mean(stored[name], old_size, len(tokenizer), f"{language}:{name}")
    tensors.update(tower_tensors)
    tensors.update(_draw_projector(tower.hidden_size, text.hidden_size, seed))
    return ModelParts(
        source=str(language),
        config=model_config,
        tensors=tensors,
        tokenizer=tokenizer,
        image_processor=image_processor,
        image_mode=config.image_mode,
        inference_image_mode=config.image_mode,
    )


def read_checkpoint(config: ModelConfig) -> ModelParts:
    """Read a checkpoint in this package's layout, in the released layout with a separate tower, or a stock LLaVA.

    Args:
        config: With ``checkpoint``, and ``vision_tower`` for the released layout.

    Raises:
        ConfigError: The folder has none of these layouts, or the tower is not given.
        WeightsError: A file cannot be read.
    """
    folder = resolve_folder(_required(config.checkpoint), "model.checkpoint")
    if (folder / ADAPTER_CONFIG).is_file() and not any((folder / name).is_file() for name in WEIGHTS_FILES):
        raise ConfigError.at(
            str(folder),
            "an adapter, expected a complete model",
            "give it as the adapter of its base, or merge it first with `llavar-peft merge`",
        )
    described = read_model_config(folder)
    kind = described.get("model_type")
    if kind == MODEL_TYPE:
        return _read_own_layout(folder, config)
    if kind == RELEASED_MODEL_TYPE and "text_config" not in described:
        return _read_released_layout(folder, described, config)
    if kind == RELEASED_MODEL_TYPE:
        return read_stock(folder)
    raise ConfigError.at(
        f"{folder / 'config.json'}:model_type",
        f"not a LLaVAR (got {kind!r}, expected {MODEL_TYPE!r}, or {RELEASED_MODEL_TYPE!r} with LLaMA's fields)",
        "for a plain language model set language_model and vision_tower instead of checkpoint",
    )


def _read_own_layout(folder: Path, config: ModelConfig) -> ModelParts:
    model_config = load_pretrained(LlavarConfig, folder)
    processor = load_pretrained(LlavarProcessor, folder)
    stored = open_weights(folder)
    check_not_delta(stored.get(tensor_names.FINAL_NORM), folder)
    tensors: dict[str, Tensor | JoinedRows] = {**stored}
    image_processor = processor.image_processor
    if config.vision_tower is not None:
        tower, tower_tensors, image_processor = _read_tower(config.vision_tower)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(tensor_names.TOWER)}
        tensors.update(tower_tensors)
        model_config.vision_config = tower
    return ModelParts(
        source=str(folder),
        config=model_config,
        tensors=tensors,
        tokenizer=processor.tokenizer,
        image_processor=image_processor,
        image_mode=processor.image_mode,
        inference_image_mode=processor.inference_image_mode,
    )


def _read_released_layout(folder: Path, described: Mapping[str, Any], config: ModelConfig) -> ModelParts:
    if config.vision_tower is None:
        raise ConfigError.at(
            "model.vision_tower",
            f"not set, and a checkpoint in the released layout contains no vision tower (it was trained with "
            f"{described.get('mm_vision_tower')!r})",
            "set it to the folder of the CLIP model that the checkpoint was trained with",
        )
    text = read_llama_config(described, folder)
    use_im_start_end = bool(described.get("mm_use_im_start_end", False))
    tokenizer = load_tokenizer(folder)
    add_image_tokens(tokenizer, use_im_start_end=use_im_start_end)
    tower, tower_tensors, image_processor = _read_tower(config.vision_tower)
    model_config = make_config(
        text,
        tower,
        vocab_size=text.vocab_size,
        image_token_id=int(tokenizer.convert_tokens_to_ids(IMAGE_PATCH_TOKEN)),
        vision_feature_layer=int(described.get("mm_vision_select_layer", config.vision_feature_layer)),
        use_im_start_end=use_im_start_end,
        sep_image_conv_front=bool(described.get("sep_image_conv_front", False)),
    )
    stored = _rename_released(open_weights(folder))
    check_not_delta(stored.get(tensor_names.FINAL_NORM), folder)
    _check_rows(stored, tokenizer, folder)
    tensors = {**stored, **tower_tensors}
    return ModelParts(
        source=str(folder),
        config=model_config,
        tensors={**tensors},
        tokenizer=tokenizer,
        image_processor=image_processor,
        image_mode=config.image_mode,
        # The original evaluates with another mode than it trains with: llava/eval/run_llava.py, resize_image.
        inference_image_mode="pad_black",
    )


def resolve_folder(name: str, setting: str) -> Path:
    """Return the folder that a setting names, downloaded from the Hugging Face hub if it is not on this disk.

    Args:
        name: A path, or a hub name ``owner/model`` where no such path exists.
        setting: The setting's path, for the message.

    Raises:
        ConfigError: There is no such folder.
        EnvironmentFaultError: The hub cannot be reached, or does not have the model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or path.parent.is_dir() or path.exists()
    if path.is_file():
        raise ConfigError.at(setting, f"a file, expected a folder (got {name!r})", _fix_for_file(path))
    if looks_local:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"did you mean {str(path.parent / near[0])!r}" if near else "give a folder, or a hub name owner/model"
        raise ConfigError.at(setting, f"no such folder (got {name!r})", hint)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's client passes on any error of its transport
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentFaultError.at(
            setting,
            f"{name!r} is not a folder, and could not be downloaded from the Hugging Face hub ({reason})",
            "give an existing folder, or check the name and the connection",
        ) from error


def _fix_for_file(path: Path) -> str:
    if path.name.startswith("mm_projector"):
        return "this is a stage-1 projector: set model.projector to it, and language_model and vision_tower"
    if path.suffix == ".gguf":
        return "GGUF files are not supported: give the folder of the model that the file was converted from"
    if (path.parent / "config.json").is_file():
        return f"give the folder of the model, {str(path.parent)!r}"
    return "give the folder that contains config.json and the weights"


def _read_tower(name: str) -> tuple[CLIPVisionConfig, dict[str, Tensor], CLIPImageProcessorPil]:
    folder = resolve_folder(name, "model.vision_tower")
    described = read_model_config(folder)
    if described.get("model_type") not in ("clip", "clip_vision_model"):
        raise ConfigError.at(
            f"{folder / 'config.json'}:model_type",
            f"not a CLIP model (got {described.get('model_type')!r}, expected 'clip' or 'clip_vision_model')",
            "give the vision tower's folder",
        )
    # Transformers 4 writes the image processor to a file of its own, transformers 5 into that of the processor.
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        raise ConfigError.at(
            str(folder),
            "no preprocessor_config.json and no processor_config.json in it",
            "copy the file from the CLIP model",
        )
    tensors = {ours: tensor for name, tensor in open_weights(folder).items() if (ours := tensor_names.from_clip(name))}
    return load_pretrained(CLIPVisionConfig, folder), tensors, load_pretrained(CLIPImageProcessorPil, folder)


def _read_language_config(folder: Path) -> LlamaConfig:
    described = read_model_config(folder)
    kind = described.get("model_type")
    if kind == RELEASED_MODEL_TYPE and "text_config" not in described:
        raise ConfigError.at(
            "model.language_model",
            f"{folder} is a complete LLaVA, expected a language model",
            "set checkpoint instead of language_model",
        )
    if kind != "llama":
        raise ConfigError.at(
            f"{folder / 'config.json'}:model_type",
            f"not a LLaMA (got {kind!r}, expected 'llama')",
            "give the folder of a LLaMA or Vicuna",
        )
    return read_llama_config(described, folder)


def _rename_released(store: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {ours: tensor for name, tensor in store.items() if (ours := tensor_names.from_released(name))}


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


def _extend_with_mean(rows: Tensor, old: int, new: int, where: str) -> JoinedRows:
    if rows.shape[0] < old:
        raise WeightsError.at(
            where,
            f"too few rows for the tokenizer (got {rows.shape[0]}, expected at least {old})",
            "put this model's own tokenizer into its folder",
        )
    return JoinedRows(rows[:old], mean_row(rows[:old]).expand(new - old, -1))


def _draw_projector(width_in: int, width_out: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    bound = width_in**-0.5  # the bound of torch.nn.Linear's initialization, for weight and bias

    def draw(*shape: int) -> Tensor:
        drawn: Tensor = (torch.rand(*shape, generator=generator) * 2 - 1) * bound
        return drawn

    return {tensor_names.PROJECTOR_WEIGHT: draw(width_out, width_in), tensor_names.PROJECTOR_BIAS: draw(width_out)}


def _required(name: str | None) -> str:
    if name is None:
        raise ConfigError.at("model", "no model is given", "set language_model and vision_tower, or checkpoint")
    return name
