"""Compiled layers and Liger's, sharded over two processes, give the losses and weights of plain layers in one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llavar_peft import Full, Lora, ModelConfig, Projector, Recipe
from llavar_peft.recipe.recipe_yaml import dump_recipe
from llavar_peft.recipe.schema import Kernels
from tests.accelerate_examples import launch_environment
from tests.training.sharded import TIME_LIMIT, ShardCounter, run

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
    copy = _write_larger_model(str(short_model.language_model), tmp_path / "larger")
    larger = dataclasses.replace(short_model, language_model=str(tmp_path / "larger"))
    one_step = dataclasses.replace(stage, tune=Projector(), max_steps=1)
    memory = dataclasses.replace(tiny_recipe, model=larger, stages=(one_step,), output_dir=str(tmp_path / "memory"))
    (tmp_path / "memory.yaml").write_text(dump_recipe(memory))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.fast_start", "tests.training.kernel_ranks", str(tmp_path)],
        env={**os.environ, **LAUNCHES[launch]}, cwd=Path(__file__).parents[2], capture_output=True, text=True,
        check=False, timeout=2 * TIME_LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    for kernels, recipe in recipes.items():
        _check_equal(Path(recipe.output_dir), ends[kernels])
    seen = [json.loads((tmp_path / f"memory.{rank}.json").read_text())["memory"] for rank in (0, 1)]
    # With a whole copy in float32, as its weights are trained here, each rank would need at least two.
    assert 0.5 * copy < sum(seen) < 3 * copy, (seen, copy)


def _write_larger_model(small: str, folder: Path) -> int:
    """Write a language model of 164 MB in float16, and return its bytes."""
    shutil.copytree(small, folder)
    config = LlamaConfig.from_pretrained(folder, hidden_size=512, head_dim=128, intermediate_size=8192)
    config.num_hidden_layers = 6
    LlamaForCausalLM(config).half().save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


def _check_equal(sharded: Path, whole: Path) -> None:
    ours, theirs = (
        [json.loads(line)["loss"] for line in (folder / "stage2/metrics.jsonl").read_text().splitlines()]
        for folder in (sharded, whole)
    )
    assert ours == pytest.approx(theirs, rel=1e-5)
    expected = sorted(whole.glob("*/*model.safetensors"))
    assert expected
    for path in expected:
        found = load_file(sharded / path.relative_to(whole))
        for name, tensor in load_file(path).items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)
