"""What a stage can train in a vision tower: the part that is computed, up to the layer whose output is projected."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from llavar_peft.errors import ConfigError
from llavar_peft.models.vision_tower import tower_features, tower_layers

TOWER = "vision_tower"
"""Name of the tower in our model."""


def computed_parameters(tower: Any, num_layers: int) -> list[str]:
    """Return the names of the parameters that a tower's features depend on, by a backward pass without memory.

    Other parameters, such as those of later layers, never get a gradient, for which the processes of a run would wait.

    Args:
        tower: The tower; it is not called.
        num_layers: Number of layers that are computed.
    """
    with torch.device("meta"), torch.enable_grad():
        skeleton = type(tower)(copy.deepcopy(tower.config))
        skeleton.set_attn_implementation("eager")  # flash-attention computes on GPUs only
        side = skeleton.config.image_size
        parameters = dict(skeleton.named_parameters())
        features_NQC = tower_features(skeleton, torch.zeros(1, 3, side, side), num_layers)
        found = torch.autograd.grad(features_NQC.sum(), list(parameters.values()), allow_unused=True)
    return [name for name, gradient in zip(parameters, found, strict=True) if gradient is not None]


def linear_tower_layers(tower: nn.Module, num_layers: int) -> dict[str, nn.Linear]:
    """Return the linear layers in the first layers of a tower, to which adapters can be added, by their names.

    Raises:
        ConfigError: No layer with linear layers is computed.
    """
    layers = tower_layers(tower)
    prefix = next(name for name, module in tower.named_modules() if module is layers)
    found = {
        f"{prefix}.{number}.{name}": module
        for number, layer in enumerate(layers[:num_layers])
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    if not found:
        raise ConfigError.at(
            "tune.tower_rank",
            f"no layers of the vision tower can get adapters ({num_layers} of its layers are computed)",
            "remove it, or set vision_feature_layer to a later layer",
        )
    return found


def tower_pattern(names: Iterable[str]) -> str:
    """Return the regular expression that selects linear layers of the vision tower.

    Args:
        names: From ``linear_tower_layers``.
    """
    parts = [re.split(r"\.(\d+)\.", name, maxsplit=1) for name in names]
    prefix = re.escape(parts[0][0])
    numbers, owns = (dict.fromkeys(part[place] for part in parts) for place in (1, 2))
    return rf"model\.{TOWER}\.{prefix}\.({'|'.join(numbers)})\.({'|'.join(map(re.escape, owns))})"
