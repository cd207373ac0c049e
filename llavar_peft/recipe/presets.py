"""The loading of a recipe, with a preset and overrides applied."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llavar_peft.errors import ConfigError
from llavar_peft.recipe.recipe_yaml import apply_overrides, parse_yaml
from llavar_peft.recipe.schema import Recipe
from llavar_peft.recipe.schema_fields import nearest
from llavar_peft.recipe.shipped_recipes import list_presets, read_shipped, shipped_names
from llavar_peft.recipe.validate import recipe_from_mapping
from llavar_peft.text_files import read_text
from llavar_peft.types import expand_home

_MOST_BYTES = 2**20  # of a recipe; records given by mistake would be parsed for hours
_RATES = ("learning_rate", "projector_learning_rate", "rows_learning_rate")


def read_recipe(name_or_path: str | Path) -> str:
    """Return the YAML text of a recipe, including comments.

    Args:
        name_or_path: The name of a shipped recipe or preset, or the path of a YAML file.

    Raises:
        ConfigError: The recipe does not exist or cannot be read.
    """
    where = str(name_or_path)
    known = shipped_names()
    if where in known:
        return read_shipped(where)
    path = expand_home(name_or_path)
    if not os.path.exists(path):  # pathlib's raises an error for a name that is too long
        near = nearest(where, known)
        names = f"did you mean '{near}'?" if near else f"use a YAML file, or one of {', '.join(known)}"
        raise ConfigError.at(where, "no such file or shipped recipe", names)
    if path.is_file() and path.stat().st_size > _MOST_BYTES:
        raise ConfigError.at(where, f"is too large for a recipe ({path.stat().st_size:,} bytes)", "give a YAML file")
    return read_text(path, error=ConfigError, fix="give a YAML file")


def load_recipe(
    name_or_path: str | Path | None = None, overrides: Sequence[str] = (), *, preset: str | None = None
) -> Recipe:
    """Read a recipe, apply a preset and overrides, and validate the result.

    Args:
        name_or_path: The name of a shipped recipe or preset (see ``shipped_recipes``), or the path of a
            YAML file. None uses the preset alone, which the overrides complete.
        overrides: Each ``path=value``, e.g. ``stages.0.optim.learning_rate=1e-3``; the value is YAML.
        preset: Name of a preset. Its ``tune`` and learning rates replace those of the recipe's last stage; its model
            settings are added to the recipe's.

    Raises:
        ConfigError: The recipe or preset does not exist, or is invalid; the message lists everything that is wrong.
    """
    if preset is None and str(name_or_path) in list_presets():
        name_or_path, preset = None, str(name_or_path)
    preset_mapping = _read_preset(preset) if preset is not None else None
    if name_or_path is None:
        if preset_mapping is None:
            raise ConfigError.at("recipe", "neither a recipe nor a preset is given", "name one of the two")
        return _complete_preset(preset_mapping, overrides, f"preset {preset}, to be completed by PATH=VALUE")
    where = str(name_or_path)
    mapping = parse_yaml(read_recipe(name_or_path), where)
    if preset_mapping is not None:
        mapping, where = _apply_preset(mapping, preset_mapping), f"{where} with preset {preset}"
    if overrides and isinstance(mapping, dict):
        mapping = apply_overrides(mapping, overrides)
    return recipe_from_mapping(mapping, where)


def _complete_preset(preset: dict[str, Any], overrides: Sequence[str], where: str) -> Recipe:
    # Empty mappings, so that each missing field is reported with its own path.
    mapping = {"model": {}, **preset, "stages": [{"data": {}, **preset["stages"][0]}]}
    try:
        return recipe_from_mapping(apply_overrides(mapping, overrides), where)
    except ConfigError as error:
        paths = {"model": "model.checkpoint"}
        faults = [
            replace(fault, fix=f"add {paths.get(fault.where, fault.where)}=...") if "missing" in fault.what else fault
            for fault in error.faults
        ]
        if faults == list(error.faults):
            raise
        raise ConfigError.listing(where, faults) from None


def _read_preset(name: str) -> dict[str, Any]:
    known = list_presets()
    if name not in known:
        near = nearest(name, known)
        fix = f"did you mean '{near}'?" if near else f"use one of {', '.join(known)}"
        raise ConfigError.at("--preset", f"unknown preset {name!r}", fix)
    return dict(parse_yaml(read_recipe(name), name))


def _apply_preset(mapping: Any, preset: dict[str, Any]) -> Any:
    """Return a recipe with a preset applied; an invalid recipe stays unchanged and is reported by the validation."""
    stages = mapping.get("stages") if isinstance(mapping, dict) else None
    if not (isinstance(stages, list) and stages and isinstance(stages[-1], dict)):
        return mapping
    changed: dict[str, Any] = copy.deepcopy(mapping)
    (preset_stage,) = preset["stages"]
    last_stage = changed["stages"][-1]
    last_stage["tune"] = preset_stage["tune"]
    optim = last_stage["optim"] if isinstance(last_stage.get("optim"), dict) else {}
    other_settings = {name: value for name, value in optim.items() if name not in _RATES}
    rates = {name: rate for name, rate in preset_stage["optim"].items() if name in _RATES}
    last_stage["optim"] = {**other_settings, **rates}
    if "model" in preset and isinstance(changed.get("model"), dict):
        changed["model"].update(preset["model"])
    return changed
