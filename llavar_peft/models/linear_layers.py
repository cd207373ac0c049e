"""The linear layers of a language model's decoder layers, to which adapters can be added, by the blocks they are in."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from llavar_peft.constants import ATTENTION_LAYERS, MLP_LAYERS
from llavar_peft.errors import ConfigError
from llavar_peft.models.decoder_structure import find_layers
from llavar_peft.recipe.schema import Lora

Blocks = Mapping[str, tuple[str, ...]]
"""``{"self_attn": ("q_proj", ...), "mlp": (...)}``, in the modules' order."""

LLAMA_BLOCKS: Blocks = {"self_attn": ATTENTION_LAYERS, "mlp": MLP_LAYERS}


def find_linear_layers(language_model: nn.Module) -> Blocks:
    """Return the names of the linear layers in a language model's decoder layers.

    Raises:
        ConfigError: The model has no decoder layers, or no linear layers in them.
    """
    found: dict[str, list[str]] = {}
    for layer in find_layers(language_model)[1]:
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear) and _is_a_layer(module):
                block, _, name = path.rpartition(".")
                names = found.setdefault(block, [])
                if name not in names:
                    names.append(name)
    if not found:
        raise ConfigError.at(
            "tune",
            f"{type(language_model).__name__} has no linear layers that adapters can be added to",
            "use tune: full, or another language model",
        )
    return {block: tuple(names) for block, names in found.items()}


def _is_a_layer(module: nn.Linear) -> bool:
    """Return whether a linear layer returns a product; the router of Phi's experts returns a choice of them."""
    if not type(module).__module__.startswith("transformers.models."):
        return True
    training, weight = module.training, module.weight
    try:
        with torch.no_grad():
            output: object = module.eval()(torch.zeros(1, module.in_features, dtype=weight.dtype, device=weight.device))
    except Exception:  # noqa: BLE001 - without memory, there are no values to choose by
        return False
    finally:
        module.train(training)
    return isinstance(output, torch.Tensor)


def choose_targets(tune: Lora, blocks: Blocks = LLAMA_BLOCKS) -> Blocks:
    """Return the layers of a language model that get adapters.

    Args:
        tune: Names a group of layers, or single layers.
        blocks: The language model's linear layers.

    Raises:
        ConfigError: A layer that is named does not exist.
    """
    if isinstance(tune.target, str):
        groups = {"all-linear": blocks, "attention": _attention(blocks), "mlp": _others(blocks)}
        if not groups[tune.target]:
            raise ConfigError.at(
                "tune.target",
                f"no linear layers of the language model belong to this group (got {tune.target!r}); the experts of a "
                "mixture are no linear layers",
                "use all-linear",
            )
        return groups[tune.target]
    known = {name for names in blocks.values() for name in names}
    unknown = [name for name in tune.target if name not in known]
    if unknown:
        raise ConfigError.at(
            "tune.target",
            f"the language model has no layers of this name (got {', '.join(unknown)}, expected some of "
            f"{', '.join(sorted(known))})",
            "correct it, or use all-linear",
        )
    chosen = {block: tuple(name for name in names if name in tune.target) for block, names in blocks.items()}
    return {block: names for block, names in chosen.items() if names}


def target_pattern(blocks: Blocks, layers: str = "layers") -> str:
    """Return the regular expression that selects these layers, anchored at the language model.

    A plain ``q_proj`` would match the vision tower too.

    Args:
        blocks: The layers.
        layers: The name of the list of layers in the decoder.
    """
    parts = [
        rf"{re.escape(block)}\.({'|'.join(names)})" if block else f"({'|'.join(names)})"
        for block, names in blocks.items()
    ]
    return rf"model\.language_model\.{re.escape(layers)}\.\d+\.({'|'.join(parts)})"


def _attention(blocks: Blocks) -> Blocks:
    return {block: names for block, names in blocks.items() if "attn" in block or "attention" in block}


def _others(blocks: Blocks) -> Blocks:
    return {block: names for block, names in blocks.items() if block not in _attention(blocks)}
