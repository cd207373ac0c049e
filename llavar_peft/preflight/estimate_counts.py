"""The numbers of a model's parameters by part, and how many of them a stage trains."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from llavar_peft.errors import ConfigError
from llavar_peft.models.build_model import expected_shapes
from llavar_peft.models.linear_layers import Blocks, choose_targets
from llavar_peft.models.llavar_config import LlavarConfig, count_needed_layers
from llavar_peft.models.tuning import TRAINED_ROWS
from llavar_peft.preflight.estimate_tower import count_trained_tower
from llavar_peft.recipe.schema import Full, Lora, Projector, Tune
from llavar_peft.weights.io import tensor_names

_MATRIX, _KERNEL = 2, 4  # dimensions
_TOWER_LAYER = re.compile(r"\.layers?\.(\d+)\.")
Shapes = Mapping[str, tuple[int, ...]]

_WHOLE_PARTS = {
    tensor_names.CROSS_ATTENTION: "cross_attention",
    tensor_names.DETAIL_ENCODER: "encoder",
    tensor_names.PROJECTOR: "projector",
}
"""The parts that are counted as a whole, by the prefix of their tensors."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of parameters.

    Attributes:
        linear: The language model's linear layers, which can be quantized.
        norms: All other parameters of the language model's layers.
        head: Input embeddings and ``lm_head``.
        tower: The vision tower.
        projector: The projector.
        adapters: The adapters that the stage adds to the language model.
        tower_linear: Those of the tower that are multiplied with each of its positions, in the layers that are needed.
        tower_patch: Those that are multiplied with each patch.
        matrices: The matrices of a layer, see ``layer_matrices``.
        adapted: The names of those that get adapters.
        has_final_norm: Whether a layer normalizes the output of its last matrix, as Gemma's and OLMo's do.
        tower_trained: Parameters that the stage trains in the vision tower: its own, or those of adapters.
        cross_attention: The cross-attention.
        encoder: Its own encoder, where that is not the tower.
    """

    linear: int
    norms: int
    head: int
    tower: int
    projector: int
    adapters: int
    tower_linear: int
    tower_patch: int
    matrices: Mapping[str, tuple[int, int]]
    adapted: frozenset[str]
    has_final_norm: bool
    tower_trained: int = 0
    cross_attention: int = 0
    encoder: int = 0

    @property
    def whole(self) -> int:
        """All parameters except adapters."""
        language_model = self.linear + self.norms + self.head
        return language_model + self.tower + self.encoder + self.projector + self.cross_attention


def count_parameters(config: LlavarConfig, tune: Tune) -> Counts:
    """Count a model's parameters.

    Raises:
        ConfigError: The language model has experts, or other parts that are neither matrices nor norms.
    """
    parts = (
        "linear", "norms", "head", "tower", "projector", "adapters", "tower_linear", "tower_patch", "cross_attention",
        "encoder",
    )  # fmt: skip
    sums = dict.fromkeys(parts, 0)
    shapes = expected_shapes(config)
    if others := [name for name, shape in shapes.items() if tensor_names.LAYER.search(name) and len(shape) > _MATRIX]:
        raise ConfigError.at(
            "model.language_model",
            f"what experts and convolutions need is not estimated (got {config.text_config.model_type!r}, which has "
            f"{others[0]})",
            "measure it: `llavar-peft train RECIPE --dry-run`",
        )
    targets = adapted_matrices(shapes, tune)
    for name, shape in shapes.items():
        if layer := tensor_names.LAYER.search(name):
            sums["linear" if len(shape) == _MATRIX else "norms"] += math.prod(shape)
            if isinstance(tune, Lora) and name[layer.end() :] in targets:
                extra = shape[0] * ((tune.variant == "dora") + (tune.bias == "lora"))
                sums["adapters"] += tune.rank * sum(shape) + extra
        elif "vision_tower" in name:
            sums["tower"] += math.prod(shape)
            layer = _TOWER_LAYER.search(name)
            if layer is None:
                sums["tower_patch"] += math.prod(shape) * (len(shape) == _KERNEL)
            elif int(layer[1]) < tower_depth(config):
                sums["tower_linear"] += math.prod(shape) * (len(shape) == _MATRIX)
        else:
            part = next((part for prefix, part in _WHOLE_PARTS.items() if name.startswith(prefix)), "head")
            sums[part] += math.prod(shape)
    has_final_norm = any(".post_feedforward" in name for name in shapes)
    return Counts(
        **sums,
        matrices=layer_matrices(shapes),
        adapted=targets,
        has_final_norm=has_final_norm,
        tower_trained=count_trained_tower(config, tune),
    )


def tower_depth(config: LlavarConfig) -> int:
    """Return the number of layers of the vision tower that are computed for the projected hidden state."""
    return count_needed_layers(config.vision_feature_layer, int(config.vision_config.num_hidden_layers))


def layer_matrices(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """Return the matrices of the language model's first layer, by their names in the layer.

    Args:
        shapes: From ``expected_shapes``.

    Returns:
        (width of the output, width of the input) by names such as ``mlp.up_proj.weight``.
    """
    return {
        name[layer.end() :]: (shape[0], shape[1])
        for name, shape in shapes.items()
        if (layer := tensor_names.LAYER.search(name)) and layer[1] == "0" and len(shape) == _MATRIX
    }


def linear_blocks(shapes: Shapes) -> Blocks:
    """Return the linear layers of a language model by their blocks, as ``find_linear_layers`` does for a model."""
    found: dict[str, tuple[str, ...]] = {}
    for name in layer_matrices(shapes):
        block, _, own = name.removesuffix(".weight").rpartition(".")
        found[block] = (*found.get(block, ()), own)
    return found


def adapted_matrices(shapes: Shapes, tune: Tune) -> frozenset[str]:
    """Return the names, in a layer, of the matrices that a stage adds adapters to."""
    if not isinstance(tune, Lora):
        return frozenset()
    chosen = choose_targets(tune, linear_blocks(shapes))
    return frozenset(f"{block}.{own}.weight" for block, names in chosen.items() for own in names)


def count_trained(config: LlavarConfig, tune: Tune, counts: Counts) -> int:
    """Return the number of parameters that a stage trains."""
    rows: int = TRAINED_ROWS * config.text_config.hidden_size * bool(config.use_im_start_end)
    if isinstance(tune, Full):
        return counts.whole - counts.tower - counts.encoder + counts.tower_trained
    if isinstance(tune, Projector):
        return counts.projector + counts.cross_attention + rows
    with_rows = rows if tune.train_image_rows else 0
    aligning = counts.cross_attention + counts.projector * tune.train_projector
    return counts.adapters + counts.tower_trained + aligning + with_rows
