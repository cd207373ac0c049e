"""Compiled layers and Liger's, sharded over two processes, give the losses and weights of plain layers in one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llavar_peft import Full, Lora, ModelConfig, Recipe
from llavar_peft.recipe.recipe_yaml import dump_recipe
from llavar_peft.recipe.schema import Kernels
from tests.accelerate_examples import launch_environment
from tests.training.sharded import TIME_LIMIT, ShardCounter, run
from tests.training.test_sharding import _check_equal

_ALL = os.environ.get("LLAVAR_SHARDED") == "all"
OFFLOAD = {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}
LAUNCHES: dict[str, dict[str, str]] = {
    "FSDP2": launch_environment("fsdp2_8gpu.yaml"),
    "ZeRO-3 with offload": {**launch_environment("zero3_8gpu.yaml"), "DS_ACCELERATOR": "cpu", **OFFLOAD},
}


@pytest.mark.slow
@pytest.mark.parametrize("launch", LAUNCHES if _ALL else ["FSDP2"])
def test_kernels_of_sharded_layers(launch: str, short_model: ModelConfig, tiny_recipe: Recipe, tmp_path: Path) -> None:
    stage = dataclasses.replace(
        tiny_recipe.stages[1],
        data=dataclasses.replace(tiny_recipe.stages[1].data, holdout=0),
        micro_batch_size=1,
        max_steps=2,
        gradient_checkpointing=True,
    )
    recipes, ends = {}, {}
    chosen: tuple[tuple[Kernels, str], ...] = (("compile", "lora"), ("liger", "full"))
    for kernels, tune in chosen:
        tuned = dataclasses.replace(stage, tune=Lora(rank=4, alpha=8, dropout=0.0) if tune == "lora" else Full())
        plain = dataclasses.replace(tiny_recipe, model=short_model, stages=(tuned,), output_dir=str(tmp_path / tune))
        run(plain, ShardCounter())
        model = dataclasses.replace(short_model, kernels=kernels)
        recipes[kernels] = dataclasses.replace(plain, model=model, output_dir=str(tmp_path / kernels))
        ends[kernels] = tmp_path / tune
        (tmp_path / f"run-{kernels}.yaml").write_text(dump_recipe(recipes[kernels]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.fast_start", "tests.training.kernel_ranks", str(tmp_path)],
        env={**os.environ, **LAUNCHES[launch]}, cwd=Path(__file__).parents[2], capture_output=True, text=True,
        check=False, timeout=2 * TIME_LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    for kernels, recipe in recipes.items():
        _check_equal(tmp_path / kernels, ends[kernels], recipe, (1e-5, 1e-5))
