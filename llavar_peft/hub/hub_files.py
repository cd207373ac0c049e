"""Which files of a folder are pushed, and the names that replace paths of this machine in them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from llavar_peft.atomic_files import dump_json
from llavar_peft.constants import RESOLVED_RECIPE_FILE
from llavar_peft.errors import DAMAGED, ConfigError, describe_reason
from llavar_peft.hub.hub_contents import Contents
from llavar_peft.text_files import read_text
from llavar_peft.weights.adapter.adapter_files import ADAPTER_CONFIG, BASE_FILE
from llavar_peft.weights.io.companion_files import LICENCES, check_link
from llavar_peft.weights.io.weights_card import portable_name

logger = logging.getLogger(__name__)

_TOKENIZER = "tokenizer_config.json"
_REWRITTEN = (ADAPTER_CONFIG, BASE_FILE, RESOLVED_RECIPE_FILE, "merge.json", "config.json", _TOKENIZER)
"""Files that may name paths of this machine, also those of an adapter in the folder of its base."""
_MODEL_KEYS = ("checkpoint", "language_model", "vision_tower", "base_model_name_or_path", "base")
"""Keys of these files that name a model, also by a relative path."""
_TOKENIZER_KEYS = ("name_or_path", "tokenizer_file", "special_tokens_map_file")
"""Other texts in a tokenizer's settings are tokens, some of which look like paths."""
_KINDS = (
    "*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "*.md", "*.yaml", "*.png", "*.jpg", "*.jpeg", "*.webp",
    "*.svg", "merges.txt", "vocab.txt", *LICENCES,
)  # fmt: skip
"""What models, adapters and their cards consist of."""
_OF_TRAINING = (
    "optimizer*", "scheduler*", "scaler*", "rng_state*", "training_args*", "trainer_state*", "manifest.json",
    "checkpoint-*", "global_step*", "pytorch_model_fsdp*",
)  # fmt: skip
"""Files and folders with the state of a training, which is no part of its result."""
_UNFINISHED = ("*.lock", "*.part", "*.tmp")
_SHOWN = 5


def collect_files(contents: Contents, names: Mapping[str, str], name: str = "") -> dict[str, Path | bytes]:
    """Return what is pushed by its path in the repository: files as they are, and texts without paths of this machine.

    Hidden files, states of a training and files of other kinds stay here; the last two are named in a warning.

    Args:
        contents: The folder.
        names: Hub name of each base, by what the settings call it.
        name: The repository, by which an adapter in the folder names its base.

    Raises:
        ConfigError: A file is a link out of the folder, or a file of settings cannot be read.
    """
    folder = contents.folder
    found: dict[str, Path | bytes] = {}
    left_out: list[str] = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in inside.parts) or _matches(path.name, _UNFINISHED):
            continue
        if any(_matches(part, _OF_TRAINING) for part in inside.parts) or not _matches(path.name, _KINDS):
            left_out.append(inside.as_posix())
            continue
        check_link(path, folder)
        found[inside.as_posix()] = _rewrite(path, names, {str(folder.resolve()): name or folder.resolve().name})
    if left_out:
        more = f", and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""
        logger.warning(
            "%s: not pushed, because no part of the result: %s%s", folder, ", ".join(left_out[:_SHOWN]), more
        )
    return found


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _rewrite(path: Path, names: Mapping[str, str], own: dict[str, str]) -> Path | bytes:
    """Return a file without paths of this machine; the file itself if it has none."""
    if path.name not in _REWRITTEN:
        return path
    text = read_text(path, error=ConfigError)
    is_json = path.suffix == ".json"
    try:
        value = json.loads(text) if is_json else yaml.safe_load(text)
        portable = _portable(value, names, own, None, of_tokenizer=path.name == _TOKENIZER)
    except (*DAMAGED, yaml.YAMLError) as error:
        what = f"cannot be read, and may name paths of this machine ({describe_reason(error)})"
        raise ConfigError.at(str(path), what, "correct the file, or remove it") from error
    if portable == value:
        return path
    if is_json:
        return (dump_json(portable, indent=2) + "\n").encode()
    first, _, _ = text.partition("\n")
    comment = f"{first}\n" if first.startswith("#") else ""
    return (comment + yaml.safe_dump(portable, sort_keys=False, allow_unicode=True)).encode("utf-8", "backslashreplace")


def _portable(value: Any, names: Mapping[str, str], own: dict[str, str], key: str | None, *, of_tokenizer: bool) -> Any:
    """Return a value with names instead of paths.

    Args:
        value: What a file holds, or a part of it.
        names: As for ``collect_files``.
        own: The name of the folder that is pushed, by its path.
        key: The last key that leads to the value.
        of_tokenizer: Whether it is of a tokenizer.
    """
    if isinstance(value, dict):
        return {name: _portable(one, names, own, name, of_tokenizer=of_tokenizer) for name, one in value.items()}
    if isinstance(value, list):
        return [_portable(one, names, own, key, of_tokenizer=of_tokenizer) for one in value]
    if not isinstance(value, str) or (of_tokenizer and key not in _TOKENIZER_KEYS):
        return value
    if key in _MODEL_KEYS and value in names:
        return names[value]
    if not (Path(value).is_absolute() or value.startswith("~")):
        return value
    last = portable_name(value)
    known = own | {source: hub for source, hub in names.items() if portable_name(source) == last}
    return known.get(value) or next((known[source] for source in names if source in known), last)
