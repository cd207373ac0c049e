"""A run whose ranks read only their shards is, bit for bit, the run whose ranks load the whole model."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llavar_peft import Lora, Recipe
from llavar_peft.recipe.recipe_yaml import dump_recipe
from tests.training.test_sharding import _environment

RESULTS = {
    "stages": ("stage1/model/mm_projector.safetensors", "model/model.safetensors"),
    "adapter": ("adapter/adapter_model.safetensors",),
    "full": ("model/model.safetensors",),
}
"""Results of the recipes: a projector and new rows, then full finetuning; DoRA with rows and projector; one stage."""
EXAMPLES = {"FSDP2": ("fsdp2_8gpu.yaml", ("stages", "adapter")), "ZeRO-3": ("zero3_8gpu.yaml", ("full",))}


def _write_recipes(tiny_recipe: Recipe, folder: Path, names: tuple[str, ...]) -> None:
    data = dataclasses.replace(tiny_recipe.stages[0].data, holdout=0)
    one, two = (
        dataclasses.replace(stage, data=data, global_batch_size=2, micro_batch_size=1) for stage in tiny_recipe.stages
    )
    # Of rank 1, so that the second process has no part of A.
    dora = Lora(rank=1, alpha=8, variant="dora", train_image_rows=True)
    stages = {
        "stages": (dataclasses.replace(one, max_steps=1), dataclasses.replace(two, max_steps=3)),
        "adapter": (dataclasses.replace(two, tune=dora, max_steps=1),),
        "full": (dataclasses.replace(two, max_steps=1),),
    }
    for name in names:
        (folder / f"{name}.yaml").write_text(dump_recipe(dataclasses.replace(tiny_recipe, stages=stages[name])))


def _steps(folder: Path) -> dict[str, list[tuple[float, float]]]:
    return {
        file.parent.name: [(step["loss"], step["grad_norm"]) for step in map(json.loads, file.read_text().splitlines())]
        for file in folder.rglob("metrics.jsonl")
    }


@pytest.mark.slow
@pytest.mark.parametrize("engine", EXAMPLES)
def test_reading_by_shard_changes_nothing(engine: str, tiny_recipe: Recipe, tmp_path: Path) -> None:
    example, names = EXAMPLES[engine]
    _write_recipes(tiny_recipe, tmp_path, names)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "-m", "tests.training.read_by_shard", str(tmp_path)],
        env={**os.environ, **_environment(example), "ACCELERATE_MIXED_PRECISION": "no"}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name in names:
        at_once, by_shard = tmp_path / "at_once" / name, tmp_path / "by_shard" / name
        assert _steps(by_shard) == _steps(at_once) != {}
        for file in RESULTS[name]:
            ours, theirs = load_file(by_shard / file), load_file(at_once / file)
            assert ours.keys() == theirs.keys()
            assert [key for key, tensor in theirs.items() if not torch.equal(ours[key], tensor)] == []
