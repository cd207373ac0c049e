"""Adapters as other programs save them, under the names and settings that this package's own adapters have.

=====================  ==============================================================================================
Saved by               Difference
=====================  ==============================================================================================
LLaVA                  ``model.layers.*`` names, and the projector in ``non_lora_trainables.bin``
transformers < 4.52    ``language_model.model.*`` names of stock LLaVA
transformers < 5       ``vision_tower.vision_model.*`` names of the tower
peft < 0.7             ``adapter_model.bin`` instead of safetensors, and ``.lora_A.default.weight`` names
=====================  ==============================================================================================
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavar_peft.errors import ConfigError, WeightsError
from llavar_peft.weights.adapter.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_FILE,
    PREFIX,
    read_base_settings,
    read_settings,
)
from llavar_peft.weights.adapter.adapter_settings import resolve_patterns
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.hub_folders import find_folder
from llavar_peft.weights.io.stated_resolution import resolution_of_adapter
from llavar_peft.weights.io.tensor_table import TensorEntry, read_file_table
from llavar_peft.weights.io.weights_fingerprint import FINGERPRINT_FILE, read_fingerprint

_BIN = "adapter_model.bin"
_LLAVA_FILE = "non_lora_trainables.bin"
"""LLaVA's file of what it trained besides the low-rank updates: the projector."""
_ADAPTER_NAME = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.default(?=\.|$)")
_LLAVA_NAME = re.compile(r"^model\.(layers|embed_tokens|norm|mm_projector)\.")
_LLAVA_KIND = re.compile(r'"model_type":\s*"llava(_\w+)?"')
_LONGEST_CONFIG = 1 << 20  # characters
_PROJECTOR = "model.multi_modal_projector."
_PROJECTOR_MODULE = "multi_modal_projector"


@dataclass(frozen=True, slots=True)
class AdapterOnDisk:
    """An adapter's settings and tensors.

    Attributes:
        folder: Its folder.
        settings: Its ``adapter_config.json``, with names instead of patterns in ``rank_pattern`` and ``alpha_pattern``.
        table: Its tensors by the names that peft gives them in our model.
        adapted: Our names of the modules that have low-rank updates.
    """

    folder: Path
    settings: dict[str, Any]
    table: dict[str, TensorEntry]
    adapted: list[str]


def open_adapter(folder: str | Path) -> AdapterOnDisk:
    """Open an adapter in any of the layouts above; only headers are read.

    Args:
        folder: Holds ``adapter_config.json`` and the tensors.

    Raises:
        ConfigError: The folder holds no adapter.
        WeightsError: A file is damaged, or its names cannot be converted.
    """
    path = find_folder(folder, "adapter")
    settings = read_settings(path)
    # All readers of adapters reject damage in the files that only some of them use.
    read_base_settings(path)
    resolution_of_adapter(path)
    read_fingerprint(path / FINGERPRINT_FILE)
    stored = _read_table(path)
    extra = read_file_table(path / _LLAVA_FILE) if (path / _LLAVA_FILE).is_file() else {}
    table: dict[str, TensorEntry] = {}
    for name, entry in {**stored, **extra}.items():
        new = _our_name(name)
        if new in table:
            raise WeightsError.at(
                f"{entry.path}:{name}", f"another tensor has the same name in our layout ({new})", "save it again"
            )
        table[new] = entry
    if any(_our_name(name).startswith(PREFIX + _PROJECTOR) for name in extra):
        settings["modules_to_save"] = sorted({*(settings.get("modules_to_save") or ()), _PROJECTOR_MODULE})
    adapted = _adapted_modules(table)
    if bool(extra) or set(table) != set(stored):
        # Targets such as q_proj would also select layers of the vision tower, which have the same names in our model.
        settings.update(target_modules=adapted, exclude_modules=None, layers_to_transform=None)
    if settings["peft_type"] == "LORA":
        settings.update(resolve_patterns(settings, adapted, str(path / ADAPTER_CONFIG)))
    return AdapterOnDisk(path, settings, table, adapted)


def is_llava_lora(folder: Path) -> bool:
    """Return whether a folder is a LoRA of LLaVA's code, which names its base but does not describe it."""
    if not (folder / ADAPTER_CONFIG).is_file() or (folder / BASE_FILE).is_file():
        return False
    return (folder / _LLAVA_FILE).is_file() or _LLAVA_KIND.search(_read_start(folder / "config.json")) is not None


def conversion_of(folder: Path, *, base: str | Path | None = None, vision_tower: str | Path | None = None) -> str:
    """Return the command that converts a LoRA of LLaVA's code into an adapter of this package, for a message.

    Args:
        folder: The LoRA.
        base: Its base, if the user gave one; None is the one that its files name.
        vision_tower: The tower, likewise.
    """
    parts = ["llavar-peft", "convert", str(folder), f"{folder.name}-adapter", "--to", "adapter"]
    parts += ["--base", str(base)] if base is not None else []
    parts += ["--vision-tower", str(vision_tower)] if vision_tower is not None else []
    return f"convert it into an adapter of this package first: `{shlex.join(parts)}`"


def _read_start(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(_LONGEST_CONFIG)


def adapter_files(folder: Path) -> list[Path]:
    """Return the existing files that an adapter's tensors and settings are read from."""
    weights = next((name for name in (ADAPTER_WEIGHTS, _BIN) if (folder / name).is_file()), ADAPTER_WEIGHTS)
    return [folder / name for name in (weights, _LLAVA_FILE, ADAPTER_CONFIG) if (folder / name).is_file()]


def _read_table(folder: Path) -> dict[str, TensorEntry]:
    for name in (ADAPTER_WEIGHTS, _BIN):
        if (folder / name).is_file():
            return read_file_table(folder / name)
    raise ConfigError.at(
        str(folder), f"no {ADAPTER_WEIGHTS} and no {_BIN} in this folder", "give the complete folder of an adapter"
    )


def _our_name(name: str) -> str:
    """Return the name that peft gives a tensor in our model."""
    plain = _ADAPTER_NAME.sub(r".\1", name.removeprefix(PREFIX))
    rename = tensor_names.from_released if _LLAVA_NAME.match(plain) else tensor_names.from_stock
    ours = rename(plain)
    return PREFIX + (ours if ours is not None else plain)


def _adapted_modules(table: Mapping[str, TensorEntry]) -> list[str]:
    found = (name.removeprefix(PREFIX) for name in table if name.endswith(".lora_A.weight"))
    return sorted(name.removesuffix(".lora_A.weight") for name in found)
