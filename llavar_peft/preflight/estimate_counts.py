"""The numbers of a model's parameters by part, and how many of them a stage trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llavar_peft.constants import LINEAR_LAYERS
from llavar_peft.models.build_model import expected_shapes
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.tuning import TRAINED_ROWS, target_layers
from llavar_peft.recipe.schema import Full, Lora, Projector, Tune

_LAYERS = "model.language_model.layers."


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of parameters.

    Attributes:
        linear: The language model's linear layers, which can be quantized.
        norms: All other parameters of the language model's layers.
        head: Input embeddings and ``lm_head``.
        tower: The vision tower.
        projector: The projector.
        adapters: The adapters that the stage adds.
    """

    linear: int
    norms: int
    head: int
    tower: int
    projector: int
    adapters: int

    @property
    def whole(self) -> int:
        """All parameters except adapters."""
        return self.linear + self.norms + self.head + self.tower + self.projector


def count_parameters(config: LlavarConfig, tune: Tune) -> Counts:
    """Count a model's parameters."""
    sums = dict.fromkeys(("linear", "norms", "head", "tower", "projector", "adapters"), 0)
    targets = target_layers(tune) if isinstance(tune, Lora) else ()
    for name, shape in expected_shapes(config).items():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if name.startswith(_LAYERS):
            sums["linear" if kind in LINEAR_LAYERS else "norms"] += math.prod(shape)
            if isinstance(tune, Lora) and kind in targets:
                extra = shape[0] * ((tune.variant == "dora") + (tune.bias == "lora"))
                sums["adapters"] += tune.rank * sum(shape) + extra
        elif "vision_tower" in name:
            sums["tower"] += math.prod(shape)
        elif "multi_modal_projector" in name:
            sums["projector"] += math.prod(shape)
        else:
            sums["head"] += math.prod(shape)
    return Counts(**sums)


def count_trained(config: LlavarConfig, tune: Tune, counts: Counts) -> int:
    """Return the number of parameters that a stage trains."""
    rows: int = TRAINED_ROWS * config.text_config.hidden_size * bool(config.use_im_start_end)
    if isinstance(tune, Full):
        return counts.whole - counts.tower
    if isinstance(tune, Projector):
        return counts.projector + rows
    with_rows = rows if tune.train_image_rows else 0
    return counts.adapters + counts.projector * tune.train_projector + with_rows
