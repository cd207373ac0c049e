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
    STOCK_MODEL_TYPES,
    TUNED_TOWER,
    UNK_TOKEN,
)
from llavar_peft.errors import DAMAGED, ConfigError, WeightsError, describe_reason
from llavar_peft.weights.delta.flat_settings import (
    FLAT_TEMPLATE,
    FLAT_TRAINED_TOWER,
    flatten_config,
    is_released_format,
    stated_template,
)
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.checkpoint_code import check_no_code
from llavar_peft.weights.io.companion_files import (
    ADDED_TOKENS_FILE,
    CHAT_TEMPLATE_FILE,
    GENERATION_FILE,
    TOKENIZER_FILES,
    TOKENIZER_MODEL,
    copy_companion,
    find_companions,
)
from llavar_peft.weights.io.hub_folders import find_folder
from llavar_peft.weights.io.quantized_weights import check_unquantized
from llavar_peft.weights.io.tensor_blocks import read_tensor
from llavar_peft.weights.io.tensor_table import DOWNLOAD_AGAIN, TensorEntry, read_tensor_table
from llavar_peft.weights.io.weights_fingerprint import FINGERPRINT_FILE, read_fingerprint

if TYPE_CHECKING:
    from torch import Tensor

_DELTA_MEAN = 0.1
"""Largest mean of a delta's last norm. Norms are initialized with 1 and change little in finetuning."""
_NORMS_OF_ONES = ("llama", RELEASED_MODEL_TYPE, "mistral", "qwen2", "qwen3", "phi3", "smollm3", "olmo2")
"""Kinds of language models whose norms are initialized with 1; others are recognized by the files of a delta."""
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
    path = find_folder(folder, "model")
    config = read_model_config(path)
    check_unquantized(config, path, "a merge, a delta or a check of an adapter's base")
    kind = config.get("model_type")
    if kind == MODEL_TYPE:
        rename, flat = tensor_names.to_released, _flatten(config, path)
    elif kind in STOCK_MODEL_TYPES and "text_config" in config:
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
    """Return the tensors of the vision tower in a model's folder by our names; none if the model has no tower there.

    LLaVA's code sometimes saves a copy of the original tower, which no reader uses, in the model.
    """
    config = read_model_config(folder)
    is_flat = not {"text_config", "vision_config"} & set(config)
    if is_flat and not config.get(FLAT_TRAINED_TOWER):
        return {}
    rename = tensor_names.from_released_tower if is_flat else tensor_names.from_stock
    stored = read_tensor_table(folder, checksums=False).items()
    ours = {new: entry for name, entry in stored if (new := rename(name)) is not None}
    return {name: entry for name, entry in ours.items() if name.startswith(tensor_names.TOWER)}


def _flatten(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    try:
        return flatten_config(config, template=stated_template(folder, config))
    except DAMAGED as error:
        what = f"its settings of a language model and a tower cannot be read ({describe_reason(error)})"
        raise ConfigError.at(str(folder / "config.json"), what, DOWNLOAD_AGAIN) from error


def check_original_tower(config: Mapping[str, Any], folder: str | Path) -> None:
    """Reject a model whose vision tower was trained, for a layout that contains no tower.

    Args:
        config: Its ``config.json``, in any layout.
        folder: Its folder, for the message.

    Raises:
        ConfigError: The tower was trained.
    """
    if config.get(TUNED_TOWER) or config.get(FLAT_TRAINED_TOWER):
        raise ConfigError.at(
            str(folder),
            "its vision tower was trained, and the released layout has none: the model would get the original tower",
            "publish it as it is, or as `llavar-peft convert --to hf-llava` writes it",
        )


def is_language_model(config: Mapping[str, Any]) -> bool:
    """Return whether a ``config.json`` is that of a plain language model rather than of one with images."""
    kind = str(config.get("model_type"))
    return kind not in (MODEL_TYPE, RELEASED_MODEL_TYPE) and not kind.startswith(f"{RELEASED_MODEL_TYPE}_")


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
        folder: The folder.
        config: The model's ``config.json``. None is a LLaMA.

    Raises:
        ConfigError: It is a delta.
    """
    if is_delta(norm, Path(folder), config or {}):
        raise ConfigError.at(
            str(folder),
            "a delta, expected complete weights (the mean of its last norm is near 0, where models have about 1)"
            if _has_norm_of_ones(config or {})
            else "a delta, expected complete weights (its fingerprints are those of a delta)",
            "add it to the weights of its base first: `llavar-peft delta apply`",
        )


def is_delta(norm: TensorEntry | Tensor | None, folder: Path, config: Mapping[str, Any]) -> bool:
    """Return whether weights are a delta: by their last RMS norm or, where that says nothing, their fingerprints.

    The mean of a delta's norm is near 0. Gemma's norms are stored as differences from 1.

    Args:
        norm: The last RMS norm; None if there is none.
        folder: The folder of the weights.
        config: Their ``config.json``.
    """
    if not _has_norm_of_ones(config):
        # An applied delta has the fingerprint of the delta too.
        known = read_fingerprint(folder / FINGERPRINT_FILE) or {}
        return "base" in known and "delta" not in known
    if norm is None:
        return False
    values = read_tensor(norm) if isinstance(norm, TensorEntry) else norm
    return values.numel() > 0 and abs(float(values.float().mean())) < _DELTA_MEAN


def _has_norm_of_ones(config: Mapping[str, Any]) -> bool:
    kind = str(config.get("text_config", config).get("model_type", "llama"))
    return kind.removeprefix(f"{RELEASED_MODEL_TYPE}_") in _NORMS_OF_ONES


def copy_companions(view: ReleasedView, staged: Path, tokenizers: Sequence[Path], dtype: str = "float16") -> None:
    """Write the files of a model other than its weights: configuration, tokenizer, generation settings.

    The original's code reads ``tokenizer.model`` only. If the model has none and another of the folders does, that one
    is copied, and the image tokens are written in the original's format.

    Args:
        view: The model.
        staged: The folder to write to.
        tokenizers: Folders with tokenizers, the model's own first.
        dtype: Of the weights, by torch's name.
    """
    config = {**view.config, "torch_dtype": dtype}
    config.pop("dtype", None)
    write_text(staged / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    companions, model = find_tokenizer(tokenizers)
    for path in companions:
        copy_companion(path, staged)
    if config.get(FLAT_TEMPLATE) == "chat":
        for path in find_companions(tokenizers[0], (CHAT_TEMPLATE_FILE,), licences=False):
            copy_companion(path, staged)
    if model is None:
        return
    if is_released_format(config) and config.get("mm_use_im_patch_token", True):
        if not ((staged / TOKENIZER_MODEL).is_file() and (staged / ADDED_TOKENS_FILE).is_file()):
            _write_released_tokenizer(model, staged, config)
    elif config.get(FLAT_TEMPLATE) != "chat" and not (staged / TOKENIZER_MODEL).is_file():
        copy_companion(model, staged)


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
