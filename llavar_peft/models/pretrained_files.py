"""Load configurations and processors of checkpoints, which may come from anyone.

No code of a checkpoint is run, sizes are bounded before anything is allocated, and whatever is wrong with a file is one
of this package's errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, CLIPVisionConfig, PretrainedConfig

from llavar_peft.errors import ConfigError, LlavarError, describe_reason
from llavar_peft.weights.io.checkpoint_code import check_no_code
from llavar_peft.weights.io.tensor_table import DOWNLOAD_AGAIN

_LoadedT = TypeVar("_LoadedT")
_ConfigT = TypeVar("_ConfigT", bound=PretrainedConfig)

_LARGEST = {
    "num_hidden_layers": 1_000, "num_attention_heads": 4_096, "num_key_value_heads": 4_096, "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000, "vocab_size": 100_000_000, "head_dim": 1_000_000, "image_size": 100_000,
    "patch_size": 100_000, "num_channels": 1_000, "projection_dim": 1_000_000, "max_position_embeddings": 1_000_000_000,
}  # fmt: skip
"""Bounds far above every model there is. A larger number is damage, and building its modules would not end."""


def load_pretrained(kind: type[_LoadedT], folder: Path, *, model_config: PretrainedConfig | None = None) -> _LoadedT:
    """Call a class's ``from_pretrained`` on a local folder.

    Args:
        kind: A configuration, tokenizer or processor class of transformers.
        folder: The folder.
        model_config: For a tokenizer, the configuration of its model; None is the one in the folder.

    Raises:
        ConfigError: A file is missing or damaged, states absurd sizes, or names code of its own.
    """
    check_no_code(folder)
    loader: Any = kind
    options = {} if model_config is None else {"config": model_config}
    try:
        loaded: _LoadedT = loader.from_pretrained(str(folder), trust_remote_code=False, **options)
    except LlavarError:
        raise
    except Exception as error:  # the loaders pass on whatever a damaged file causes
        raise unreadable_settings(folder, kind.__name__, error) from error
    if isinstance(loaded, PretrainedConfig):
        check_sizes(loaded, folder)
    return loaded


def make_settings(kind: type[_ConfigT], fields: Any, folder: Path) -> _ConfigT:
    """Make a configuration from fields of a ``config.json``.

    Args:
        kind: A configuration class of transformers.
        fields: By name.
        folder: The folder of the file, for messages.

    Raises:
        ConfigError: A value is none that a model can have.
    """
    try:
        config: _ConfigT = kind(**fields)
    except Exception as error:  # transformers passes on whatever a damaged file causes
        raise unreadable_settings(folder, kind.__name__, error) from error
    check_sizes(config, folder)
    return config


def make_part_settings(fields: Any, folder: Path, *, default: str) -> PretrainedConfig:
    """Make the configuration of a language model or a vision tower, of the kind that its fields state.

    Args:
        fields: By name; ``model_type`` is the kind. A whole CLIP counts as its tower.
        folder: The folder of the file, for messages.
        default: The kind where none is stated.

    Raises:
        ConfigError: The kind is unknown, or a value is none that a model can have.
    """
    stated = fields.get("model_type", default) if isinstance(fields, Mapping) else default
    kind = "clip_vision_model" if stated == "clip" else stated
    if kind == "clip_vision_model":
        return make_settings(CLIPVisionConfig, fields, folder)
    try:
        config: PretrainedConfig = AutoConfig.for_model(**{**_with_special_floats(fields), "model_type": kind})
    except Exception as error:  # transformers passes on whatever a damaged file causes
        raise unreadable_settings(folder, f"configuration of the kind {kind}", error) from error
    check_sizes(config, folder)
    return config


def _with_special_floats(value: Any) -> Any:
    """Return settings with the floats that JSON has not, which transformers writes as ``{"__float__": "Infinity"}``."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {name: _with_special_floats(one) for name, one in value.items()}
    return [_with_special_floats(one) for one in value] if isinstance(value, list) else value


def unreadable_settings(folder: Path, what: str, error: Exception) -> LlavarError:
    """Return the error for a folder whose configuration, tokenizer or processor cannot be loaded."""
    if isinstance(error, UnicodeEncodeError) and any("\ud800" <= one <= "\udfff" for one in str(folder)):
        what = f"its path is not UTF-8, and cannot be opened as a {what}"
        return ConfigError.at(str(folder), what, "rename the folder")
    reason = describe_reason(error)
    return ConfigError.at(
        str(folder),
        f"its files of settings cannot be read as a {what} ({type(error).__name__}: {reason})",
        DOWNLOAD_AGAIN,
    )


def with_defaults(config_json: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings of a ``config.json`` with the defaults of its kind, unchecked.

    Raises:
        ConfigError: It names no kind of model, or one that the installed transformers does not have.
    """
    kind = config_json.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ConfigError.at(
            f"{folder / 'config.json'}:model_type",
            f"not an architecture of transformers {transformers.__version__} (got {ascii(kind)[:80]})",
            "give a model of a kind that transformers has, or update transformers if a newer one has it",
        )
    return {**CONFIG_MAPPING[kind]().to_dict(), **config_json}


def check_sizes(config: PretrainedConfig, folder: Path) -> None:
    """Reject a configuration, including the parts of it, whose sizes are no numbers that a model can have.

    Raises:
        ConfigError: Names the field.
    """
    parts = [config, *(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)]
    for part in parts:
        if not isinstance(part.dtype, torch.dtype | None):
            raise ConfigError.at(
                f"{folder / 'config.json'}:dtype",
                f"not a number format of torch (got {ascii(part.dtype)[:80]}, expected for example 'bfloat16')",
                DOWNLOAD_AGAIN,
            )
        _check_dropout(part, folder)
        for name, largest in _LARGEST.items():
            try:
                value = getattr(part, name, None)
            except RuntimeError:  # it differs between the layers (Gemma 4)
                continue
            if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 < value <= largest):
                continue
            raise ConfigError.at(
                f"{folder / 'config.json'}:{name}",
                f"not a size of a model (got {ascii(value)[:80]}, expected a number from 1 to {largest})",
                DOWNLOAD_AGAIN,
            )


def _check_dropout(part: PretrainedConfig, folder: Path) -> None:
    """Reject shares of dropped activations that are no probabilities: they fail in the first step that has dropout."""
    for name, value in vars(part).items():
        if not name.endswith("dropout") or not isinstance(value, int | float):
            continue
        if isinstance(value, bool) or not 0 <= value <= 1:
            raise ConfigError.at(
                f"{folder / 'config.json'}:{name}",
                f"not a probability (got {ascii(value)[:80]}, expected a number from 0 to 1)",
                DOWNLOAD_AGAIN,
            )
