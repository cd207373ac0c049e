"""The small runs of these tests, and the combinations of settings that they cover."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from llavar_peft import Full, Lora, Projector, Recipe
from llavar_peft.recipe.schema import Dtype, Quantization, Tune

_LORA = Lora(rank=4, alpha=8, dropout=0.0, train_image_rows=False)
TUNES: dict[str, Tune] = {
    "projector": Projector(),
    "full": Full(),
    "lora": _LORA,
    "rows": dataclasses.replace(_LORA, train_image_rows=True),
    "dora": dataclasses.replace(_LORA, variant="dora"),
    "pissa": dataclasses.replace(_LORA, variant="pissa"),
    "qlora": dataclasses.replace(_LORA, train_image_rows=True),
}
STORAGE: dict[str, Quantization] = {"qlora": "nf4"}
"""How the base is stored under a tuning, if it is quantized."""
STEPS = 2


class Combination(NamedTuple):
    """A tuning with the settings under which it is trained."""

    tune: str
    packing: bool
    checkpointing: bool | str
    precision: str


# All 12 combinations of packing, checkpointing and precision, each with one tuning. Each tuning is trained packed and
# padded, in bf16 and in fp16, and under two of the three settings of checkpointing. The full product has 84 runs.
MATRIX = (
    Combination("lora", True, False, "bf16"),
    Combination("lora", False, "auto", "fp16"),
    Combination("full", True, True, "bf16"),
    Combination("full", False, False, "fp16"),
    Combination("rows", True, "auto", "bf16"),
    Combination("rows", False, True, "fp16"),
    Combination("projector", False, False, "bf16"),
    Combination("projector", True, "auto", "fp16"),
    Combination("dora", False, True, "bf16"),
    Combination("dora", True, False, "fp16"),
    Combination("pissa", False, "auto", "bf16"),
    Combination("pissa", True, True, "fp16"),
    Combination("qlora", True, True, "bf16"),
    Combination("qlora", False, "auto", "fp16"),
)


def small_recipe(recipe: Recipe, tune: str, *, output_dir: str, precision: str = "bf16", **changes: Any) -> Recipe:
    """Return a recipe of one stage of a few steps with a holdout, in half precision.

    Args:
        recipe: The two-stage recipe of the tests of training.
        tune: What is trained, a key of ``TUNES``.
        output_dir: The folder of the run.
        precision: Of the computation; the weights are stored in the same.
        **changes: Other fields of the stage.
    """
    stage = recipe.stages[1]
    probe = dataclasses.replace(stage.probe, images=1, loss_records=2, max_new_tokens=2)
    changed: Any = {
        "max_steps": STEPS,
        "gradient_checkpointing": False,
        "precision": precision,
        "probe": probe,
        **changes,
    }
    dtype: Dtype = "bfloat16" if precision == "bf16" else "float16"
    model = dataclasses.replace(recipe.model, dtype=dtype, quantize=STORAGE.get(tune))
    stages = (dataclasses.replace(stage, tune=TUNES[tune], **changed),)
    return dataclasses.replace(recipe, model=model, stages=stages, output_dir=output_dir)
