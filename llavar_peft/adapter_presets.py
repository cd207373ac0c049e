"""Ready-made ways of tuning, by name: the files of the repository's ``adapters/``, shipped inside the package."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavar_peft.config_paths import nearest
from llavar_peft.errors import ConfigError
from llavar_peft.recipe_text import parse_yaml

_HERE = Path(__file__).parent
# In a checkout the files are read where they are written.
_FOLDER = next((one for one in (_HERE / "presets/adapters", _HERE.parent / "adapters") if one.is_dir()), _HERE)
_SUFFIX = ".yaml"
_RATES = ("learning_rate", "projector_learning_rate")


def list_presets() -> dict[str, str]:
    """Returns the presets' names, each with its first line's description."""
    files = sorted(_FOLDER.glob(f"*{_SUFFIX}"))
    return {file.stem: file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for file in files}


def read_preset(name: str) -> str:
    """Returns the text of a preset, comments included.

    Args:
        name: One of ``list_presets``.

    Returns:
        The YAML text: a recipe of one stage, without model, data and output folder.

    Raises:
        ConfigError: There is no such preset.
    """
    known = list_presets()
    if name not in known:
        near = nearest(name, known)
        mend = f"perhaps you meant '{near}'" if near else f"use one of {', '.join(known)}"
        raise ConfigError.at("--preset", f"there is no preset {name!r}", mend)
    return (_FOLDER / f"{name}{_SUFFIX}").read_text(encoding="utf-8")


def lay_preset(name: str, recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    """Lays a preset over a recipe that is still plain data.

    Args:
        name: One of ``list_presets``.
        recipe: Its last stage gets the preset's ``tune`` and learning rates, its model the preset's ``quantize``; None
            takes the preset for the whole recipe.

    Returns:
        A copy. What is wrong with it is found when it is validated.

    Raises:
        ConfigError: There is no such preset.
    """
    preset: dict[str, Any] = parse_yaml(read_preset(name), f"preset {name}")
    stage = preset["stages"][0]
    if recipe is None:
        stage.setdefault("data", {})
        return preset
    laid = copy.deepcopy(dict(recipe))
    model, stages = laid.get("model"), laid.get("stages")
    if isinstance(model, dict):
        model["quantize"] = preset["model"]["quantize"]
    if isinstance(stages, list) and stages and isinstance(stages[-1], dict):
        last = stages[-1]
        last["tune"] = stage["tune"]
        optim = last.get("optim")
        kept = {key: value for key, value in optim.items() if key not in _RATES} if isinstance(optim, dict) else {}
        last["optim"] = {**kept, **stage["optim"]}
    return laid
