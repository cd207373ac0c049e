"""The released layout: its view of a folder of weights, flat configuration, and tokenizer files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.atomic_files import write_text
from llavar_peft.constants import (
    ADDED_TOKENS,
    BOS_TOKEN,
    EOS_TOKEN,
    MODEL_TYPE,
    PAD_TOKEN,
    RELEASED_MODEL_TYPE,
    TUNED_TOWER,
    UNK_TOKEN,
)
from llavar_peft.errors import DAMAGED, ConfigError, WeightsError, describe_reason
from llavar_peft.types import expand_home
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.checkpoint_code import check_no_code
from llavar_peft.weights.io.companion_files import (
    ADDED_TOKENS_FILE,
    GENERATION_FILE,
    TOKENIZER_FILES,
    TOKENIZER_MODEL,
    copy_companion,
    find_companions,
)
from llavar_peft.weights.io.tensor_blocks import read_tensor
from llavar_peft.weights.io.tensor_table import DOWNLOAD_AGAIN, TensorEntry, read_tensor_table

if TYPE_CHECKING:
    from torch import Tensor

_TEXT_FIELDS = (
    "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "rms_norm_eps", "vocab_size",
)  # fmt: skip
_ORIGINAL_TOWER = "openai/clip-vit-large-patch14-336"
_DELTA_MEAN = 0.1
"""Largest mean of a delta's last norm. Norms are initialized with 1 and change little in finetuning."""
_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, slots=True)
class ReleasedView:
    """A model on disk in terms of the released layout.

    Attributes:
        folder: Its folder.
        config: Its flat configuration.
        table: Its tensors by released names, in the order of the files, without buffers and vision tower.
    """

    folder: Path
    config: dict[str, Any]
    table: dict[str, TensorEntry]


def view_as_released(folder: str | Path) -> ReleasedView:
    """View a language model, a LLaVA, a delta, or a checkpoint of ours in the released layout.

    Args:
        folder: Holds ``config.json`` and weights.

    Raises:
        ConfigError: No such folder, or another kind of model.
        WeightsError: Weights are missing, truncated, or quantized.
    """
    path = expand_home(folder)
    config = read_model_config(path)
    kind = config.get("model_type")
    if kind == MODEL_TYPE:
        rename, flat = tensor_names.to_released, _flatten(config, path)
    elif kind == RELEASED_MODEL_TYPE and "text_config" in config:
        rename, flat = _released_name_of_stock, _flatten(config, path)
    elif isinstance(kind, str) and not {"text_config", "vision_config"} & set(config):
        rename, flat = _without_buffers, config
    else:
        raise ConfigError.at(
            f"{path / 'config.json'}:model_type",
            f"unsupported kind of model (got {kind!r}, expected a language model, {MODEL_TYPE!r} or "
            f"{RELEASED_MODEL_TYPE!r})",
            "give a language model, a LLaVA or LLaVAR, or a checkpoint of this package",
        )
    table = {new: entry for old, entry in read_tensor_table(path).items() if (new := rename(old)) is not None}
    for entry in table.values():
        if entry.dtype not in _FLOATS:
            what = f"unsupported dtype (got {entry.dtype}, expected one of {', '.join(_FLOATS)})"
            raise WeightsError.at(entry.location, what, "use unquantized weights")
    return ReleasedView(path, flat, table)


def read_tower_table(folder: Path) -> dict[str, TensorEntry]:
    """Return the tensors of the vision tower in a model's folder by our names; none if the folder contains no tower."""
    stored = read_tensor_table(folder, checksums=False).items()
    ours = {new: entry for name, entry in stored if (new := tensor_names.from_stock(name)) is not None}
    return {name: entry for name, entry in ours.items() if name.startswith(tensor_names.TOWER)}


def _flatten(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    try:
        return flatten_config(config)
    except DAMAGED as error:
        what = f"its settings of a language model and a tower cannot be read ({describe_reason(error)})"
        raise ConfigError.at(str(folder / "config.json"), what, DOWNLOAD_AGAIN) from error


def check_original_tower(config: Mapping[str, Any], folder: str | Path) -> None:
    """Reject a model whose vision tower was trained, for a layout that contains no tower.

    Args:
        config: Its ``config.json``.
        folder: Its folder, for the message.

    Raises:
        ConfigError: The tower was trained.
    """
    if config.get(TUNED_TOWER):
        raise ConfigError.at(
            str(folder),
            "its vision tower was trained, and the released layout has none: the model would get the original tower",
            "publish it as it is, or as `llavar-peft convert --to hf-llava` writes it",
        )


def is_language_model(config: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` is that of a plain language model rather than of one with images."""
    return config.get("model_type") not in (MODEL_TYPE, RELEASED_MODEL_TYPE)


def check_released_kind(view: ReleasedView) -> None:
    """Reject a model that the released layout cannot express.

    Raises:
        ConfigError: Its language model is no LLaMA.
    """
    kind = view.config.get("model_type")
    if kind not in ("llama", RELEASED_MODEL_TYPE):
        raise ConfigError.at(
            str(view.folder),
            f"the released layout exists for LLaMA and Vicuna only (got a model of the kind {kind!r})",
            "merge the adapter with `llavar-peft merge`, which writes a complete model",
        )


def _released_name_of_stock(name: str) -> str | None:
    ours = tensor_names.from_stock(name)
    return None if ours is None else tensor_names.to_released(ours)


def _without_buffers(name: str) -> str | None:
    return None if tensor_names.from_released(name) is None else name


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read the ``config.json`` of a model's folder.

    Raises:
        ConfigError: The folder or the file does not exist, the file holds no JSON object, or a file of the folder names
            code to run.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "no such folder" if not folder.is_dir() else "no config.json in this folder"
        near = sorted(path.parent for place in (folder, folder.parent) for path in place.glob("*/config.json"))
        fix = f"did you mean {str(near[0])!r}?" if len(near) == 1 else "give the folder that the model was saved to"
        raise ConfigError.at(str(folder), what, fix) from None
    except DAMAGED as error:
        raise ConfigError.at(str(path), f"not readable as JSON ({describe_reason(error)})", DOWNLOAD_AGAIN) from error
    if not isinstance(config, dict):
        raise ConfigError.at(str(path), f"not a JSON object (got a {type(config).__name__})", DOWNLOAD_AGAIN)
    check_no_code(folder)
    return config


def check_not_delta(
    norm: TensorEntry | Tensor | None, folder: str | Path, config: Mapping[str, Any] | None = None
) -> None:
    """Reject a delta where complete weights are expected: a model would load it and answer with gibberish.

    Args:
        norm: The last RMS norm, ``tensor_names.FINAL_NORM``; None if the folder holds none.
        folder: The folder, for the message.
        config: The model's ``config.json``; deltas are of LLaMA's kind. Gemma's norms, for example, are stored as
            differences from 1. None is a LLaMA.

    Raises:
        ConfigError: The norm is that of a delta.
    """
    kind = (config or {}).get("text_config", config or {}).get("model_type", "llama")
    if norm is not None and kind in ("llama", RELEASED_MODEL_TYPE) and is_delta(norm):
        raise ConfigError.at(
            str(folder),
            "a delta, expected complete weights (the mean of its last norm is near 0, where models have about 1)",
            "add it to LLaMA's weights first: `llavar-peft delta apply`",
        )


def is_delta(norm: TensorEntry | Tensor) -> bool:
    """Return whether the last RMS norm is that of a delta, whose mean is near 0."""
    values = read_tensor(norm) if isinstance(norm, TensorEntry) else norm
    return values.numel() > 0 and abs(float(values.float().mean())) < _DELTA_MEAN


def flatten_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert our ``config.json`` to the flat one of the released layout, which the original's ``LlavaConfig`` reads.

    Source: the ``config.json`` of the released LLaVAR delta.
    """
    text, vision = config["text_config"], config["vision_config"]
    kind = text.get("model_type", "llama")
    flat = {key: text[key] for key in _TEXT_FIELDS if key in text}
    is_original = (vision.get("hidden_size"), vision.get("image_size"), vision.get("patch_size")) == (1024, 336, 14)
    tower = _ORIGINAL_TOWER if is_original else vision.get("_name_or_path") or "clip"
    if text.get("num_key_value_heads") not in (None, text.get("num_attention_heads")):
        flat["num_key_value_heads"] = text["num_key_value_heads"]  # unknown to the original's LLaMA
    return dict(
        sorted(
            {
                **flat,
                "architectures": ["LlavaLlamaForCausalLM"],
                "freeze_mm_mlp_adapter": False,
                "mm_hidden_size": vision["hidden_size"],
                **({"mm_projector_type": "mlp2x_gelu"} if config.get("projector_hidden_act") == "gelu" else {}),
                "mm_use_im_start_end": config.get("use_im_start_end", True),
                "mm_vision_select_layer": config.get("vision_feature_layer", -2),
                "mm_vision_tower": tower,
                "model_type": RELEASED_MODEL_TYPE if kind == "llama" else f"{RELEASED_MODEL_TYPE}_{kind}",
                "pad_token_id": 0,
                "sep_image_conv_front": config.get("sep_image_conv_front", False),
                "tie_word_embeddings": False,
                "torch_dtype": "float16",
                "transformers_version": "4.28.1",
                "tune_mm_mlp_adapter": False,
                "use_cache": True,
                "use_mm_proj": True,
            }.items()
        )
    )


def copy_companions(view: ReleasedView, staged: Path, tokenizers: Sequence[Path]) -> None:
    """Write the files of a model other than its weights: configuration, tokenizer, generation settings.

    The original's code reads ``tokenizer.model`` only. If the model has none and another of the folders does, that one
    is copied, and the image tokens are written in the original's format.

    Args:
        view: The model.
        staged: The folder to write to.
        tokenizers: Folders with tokenizers, the model's own first.
    """
    config = {**view.config, "torch_dtype": "float16"}
    config.pop("dtype", None)
    write_text(staged / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    companions, model = find_tokenizer(tokenizers)
    for path in companions:
        copy_companion(path, staged)
    complete = (staged / TOKENIZER_MODEL).is_file() and (staged / ADDED_TOKENS_FILE).is_file()
    if model is not None and config.get("model_type") == RELEASED_MODEL_TYPE and not complete:
        _write_released_tokenizer(model, staged, config)


def find_tokenizer(folders: Sequence[Path]) -> tuple[list[Path], Path | None]:
    """Return the tokenizer's files in the first folder, and the first ``tokenizer.model`` of all.

    Raises:
        ConfigError: One of them is a link out of its folder, or a folder names code to run.
    """
    companions = find_companions(folders[0], (*TOKENIZER_FILES, GENERATION_FILE), licences=False)
    models = (path for folder in folders for path in find_companions(folder, (TOKENIZER_MODEL,), licences=False))
    return companions, next(models, None)


def _write_released_tokenizer(model: Path, staged: Path, config: Mapping[str, Any]) -> None:
    """Replace the tokenizer's files by LLaMA's with the image tokens. Source: those of the released LLaVAR delta."""
    for name in TOKENIZER_FILES:
        (staged / name).unlink(missing_ok=True)
    copy_companion(model, staged)
    added = ADDED_TOKENS if config.get("mm_use_im_start_end") else ADDED_TOKENS[:1]
    first = int(config["vocab_size"]) - len(added)
    plain = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {
        role: {"content": content, **plain}
        for role, content in (("bos_token", BOS_TOKEN), ("eos_token", EOS_TOKEN), ("unk_token", UNK_TOKEN))
    }
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.get("max_position_embeddings", 2048),
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **{role: {"__type": "AddedToken", **token} for role, token in special.items()},
    }
    for name, content in (
        (ADDED_TOKENS_FILE, {token: first + number for number, token in enumerate(added)}),
        ("special_tokens_map.json", {**special, "pad_token": PAD_TOKEN}),
        ("tokenizer_config.json", settings),
    ):
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
        write_text(staged / name, text + "\n")
