"""Where a model comes from: a language model and a tower, one of our checkpoints, or one in the released layout.

Each reader returns ``Parts``: a configuration, the tensors by our names (lazily mapped from disk), tokenizer and image
processor.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llavar_peft.constants import IMAGE_PATCH_TOKEN, MODEL_TYPE, RELEASED_MODEL_TYPE
from llavar_peft.errors import ConfigError, EnvironmentFaultError, WeightsError
from llavar_peft.models.hf_llava import read_stock
from llavar_peft.models.llama_tokenizer import add_image_tokens, load_tokenizer
from llavar_peft.models.llavar_config import LlavarConfig, llama_config_from_released, make_config
from llavar_peft.models.model_parts import Parts
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.recipe.schema import ModelConfig
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.tensor_blocks import open_weights

if TYPE_CHECKING:
    from torch import Tensor

_HUB_FILES = ["*.json", "*.safetensors", "*.bin", "tokenizer.model"]


def read_parts(config: ModelConfig, *, seed: int) -> Parts:
    """Read a plain LLaMA or Vicuna and a CLIP tower, and draws a new projector.

    New embedding rows start as the mean of the old ones; the projector as ``torch.nn.Linear`` starts.

    Args:
        config: With ``language_model`` and ``vision_tower``.
        seed: Draws the projector.

    Returns:
        The parts of a new LLaVAR.

    Raises:
        ConfigError: A folder is not what it should be.
        WeightsError: A file cannot be read.
    """
    language = resolve_folder(_named(config.language_model), "model.language_model")
    text = _llama_config(language)
    tokenizer = load_tokenizer(language)
    old_size = len(tokenizer)
    add_image_tokens(tokenizer, use_im_start_end=config.use_im_start_end)
    tower, tower_tensors, image_processor = _read_tower(_named(config.vision_tower))
    whole = make_config(
        text,
        tower,
        vocab_size=len(tokenizer),
        image_token_id=int(tokenizer.convert_tokens_to_ids(IMAGE_PATCH_TOKEN)),
        vision_feature_layer=config.vision_feature_layer,
        use_im_start_end=config.use_im_start_end,
    )
    tensors = _renamed(open_weights(language))
    if tensor_names.HEAD not in tensors and text.tie_word_embeddings and tensor_names.EMBEDDINGS in tensors:
        tensors[tensor_names.HEAD] = tensors[tensor_names.EMBEDDINGS]
    for name in (tensor_names.EMBEDDINGS, tensor_names.HEAD):
        if name in tensors:
            tensors[name] = _extended(tensors[name], old_size, len(tokenizer), f"{language}:{name}")
    tensors.update(tower_tensors)
    tensors.update(_new_projector(tower.hidden_size, text.hidden_size, seed))
    return Parts(
        source=str(language),
        config=whole,
        tensors=tensors,
        tokenizer=tokenizer,
        image_processor=image_processor,
        image_mode=config.image_mode,
        inference_image_mode=config.image_mode,
    )


def read_checkpoint(config: ModelConfig) -> Parts:
    """Read one of our checkpoints, one in the released layout with a tower taken from elsewhere, or a stock LLaVA.

    Args:
        config: With ``checkpoint``, and ``vision_tower`` for the released layout.

    Returns:
        The checkpoint's parts.

    Raises:
        ConfigError: None of these layouts, or the tower is not named.
        WeightsError: A file cannot be read.
    """
    folder = resolve_folder(_named(config.checkpoint), "model.checkpoint")
    described = _read_json(folder / "config.json")
    kind = described.get("model_type")
    if kind == MODEL_TYPE:
        return _read_ours(folder, config)
    if kind == RELEASED_MODEL_TYPE and "text_config" not in described:
        return _read_released(folder, described, config)
    if kind == RELEASED_MODEL_TYPE:
        return read_stock(folder)
    raise ConfigError.at(
        f"{folder / 'config.json'}:model_type",
        f"not a LLaVAR (got {kind!r}, expected {MODEL_TYPE!r}, or {RELEASED_MODEL_TYPE!r} with LLaMA's fields)",
        "for a plain language model give language_model and vision_tower instead of checkpoint",
    )


def _read_ours(folder: Path, config: ModelConfig) -> Parts:
    whole = LlavarConfig.from_pretrained(folder)
    processor = LlavarProcessor.from_pretrained(folder)
    tensors = dict(open_weights(folder))
    image_processor = processor.image_processor
    if config.vision_tower is not None:
        tower, tower_tensors, image_processor = _read_tower(config.vision_tower)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(tensor_names.TOWER)}
        tensors.update(tower_tensors)
        whole.vision_config = tower
    return Parts(
        source=str(folder),
        config=whole,
        tensors=tensors,
        tokenizer=processor.tokenizer,
        image_processor=image_processor,
        image_mode=processor.image_mode,
        inference_image_mode=processor.inference_image_mode,
    )


def _read_released(folder: Path, described: Mapping[str, Any], config: ModelConfig) -> Parts:
    if config.vision_tower is None:
        raise ConfigError.at(
            "model.vision_tower",
            f"not given, and a checkpoint in the released layout holds no tower (its was "
            f"{described.get('mm_vision_tower')!r})",
            "name the CLIP folder it was trained with",
        )
    text = llama_config_from_released(described)
    use_im_start_end = bool(described.get("mm_use_im_start_end", False))
    tokenizer = load_tokenizer(folder)
    add_image_tokens(tokenizer, use_im_start_end=use_im_start_end)
    tower, tower_tensors, image_processor = _read_tower(config.vision_tower)
    whole = make_config(
        text,
        tower,
        vocab_size=text.vocab_size,
        image_token_id=int(tokenizer.convert_tokens_to_ids(IMAGE_PATCH_TOKEN)),
        vision_feature_layer=int(described.get("mm_vision_select_layer", config.vision_feature_layer)),
        use_im_start_end=use_im_start_end,
        sep_image_conv_front=bool(described.get("sep_image_conv_front", False)),
    )
    tensors = _renamed(open_weights(folder))
    tensors.update(tower_tensors)
    return Parts(
        source=str(folder),
        config=whole,
        tensors=tensors,
        tokenizer=tokenizer,
        image_processor=image_processor,
        image_mode=config.image_mode,
        # LLaVAR, llava/eval/run_llava.py, resize_image: not what it was trained with, but how it was evaluated.
        inference_image_mode="pad_black",
    )


def resolve_folder(name: str, setting: str) -> Path:
    """The folder that a setting names: as it is, or fetched from the hub.

    Args:
        name: A path, or a hub name ``owner/model`` where no such path exists.
        setting: The setting's path, for the message.

    Returns:
        An existing folder.

    Raises:
        ConfigError: No such folder.
        EnvironmentFaultError: The hub cannot be reached, or does not have it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1 or path.parent.is_dir() or path.exists()
    if looks_local:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f"did you mean {str(path.parent / near[0])!r}" if near else "give a folder, or a hub name owner/model"
        what = "a file, expected a folder" if path.exists() else "no such folder"
        raise ConfigError.at(setting, f"{what} (got {name!r})", hint)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's client lets its transport's errors through
        reason = str(error).strip().splitlines()[0]
        raise EnvironmentFaultError.at(
            setting, f"{name!r} is no folder here and could not be fetched ({reason})", "give a folder that exists"
        ) from error


def _read_tower(name: str) -> tuple[CLIPVisionConfig, dict[str, Tensor], CLIPImageProcessorPil]:
    folder = resolve_folder(name, "model.vision_tower")
    described = _read_json(folder / "config.json")
    if described.get("model_type") not in ("clip", "clip_vision_model"):
        raise ConfigError.at(
            f"{folder / 'config.json'}:model_type",
            f"not a CLIP (got {described.get('model_type')!r}, expected 'clip' or 'clip_vision_model')",
            "give the folder of the vision tower",
        )
    config = CLIPVisionConfig.from_pretrained(folder)
    tensors = {ours: tensor for name, tensor in open_weights(folder).items() if (ours := tensor_names.from_clip(name))}
    _read_json(folder / "preprocessor_config.json")  # its absence deserves our message
    return config, tensors, CLIPImageProcessorPil.from_pretrained(folder)


def _llama_config(folder: Path) -> LlamaConfig:
    described = _read_json(folder / "config.json")
    kind = described.get("model_type")
    if kind == RELEASED_MODEL_TYPE and "text_config" not in described:
        raise ConfigError.at(
            "model.language_model", f"{folder} is a whole LLaVA, not a language model", "give it as checkpoint"
        )
    if kind != "llama":
        raise ConfigError.at(
            f"{folder / 'config.json'}:model_type",
            f"not a LLaMA (got {kind!r}, expected 'llama')",
            "give the folder of a LLaMA or Vicuna",
        )
    return llama_config_from_released(described) if "rope_parameters" not in described else LlamaConfig(**described)


def _renamed(store: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {ours: tensor for name, tensor in store.items() if (ours := tensor_names.from_released(name))}


def _extended(rows: Tensor, old: int, new: int, where: str) -> Tensor:
    if rows.shape[0] < old:
        raise WeightsError.at(
            where, f"too few rows (got {rows.shape[0]}, the tokenizer has {old})", "use the tokenizer of this model"
        )
    known = rows[:old].float()
    return torch.cat([known, known.mean(dim=0, keepdim=True).expand(new - old, -1)])


def _new_projector(width_in: int, width_out: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    bound = width_in**-0.5  # what torch.nn.Linear draws from, for weight and bias alike

    def draw(*shape: int) -> Tensor:
        drawn: Tensor = (torch.rand(*shape, generator=generator) * 2 - 1) * bound
        return drawn

    return {tensor_names.PROJECTOR_WEIGHT: draw(width_out, width_in), tensor_names.PROJECTOR_BIAS: draw(width_out)}


def _named(name: str | None) -> str:
    if name is None:
        raise ConfigError.at("model", "no model is named", "give language_model and vision_tower, or checkpoint")
    return name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError.at(str(path), "no such file", "give the folder that the model was saved to") from None
    except (OSError, ValueError) as error:
        raise ConfigError.at(str(path), f"not readable as JSON ({error})", "fetch the file again") from error
    if not isinstance(content, dict):
        raise ConfigError.at(str(path), f"holds a {type(content).__name__}, expected an object", "fetch the file again")
    return content
