"""FSDP2 and ZeRO-3 on two processes give the losses and weights of one process, and do shard the parameters."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from llavar_peft import Lora, Recipe
from llavar_peft.recipe.recipe_yaml import dump_recipe
from llavar_peft.recipe.schema import Quantization
from tests.training.sharded import ShardCounter, run

EXAMPLES = Path(__file__).parents[2] / "examples/accelerate"
ENGINES = {"FSDP2": "qlora_fsdp2_2gpu.yaml", "ZeRO-3": "zero3_8gpu.yaml"}


def _environment(example: str) -> dict[str, str]:
    """Return the environment that ``accelerate launch`` gives its processes for an example's file, in float32."""
    parsed = launch_command_parser().parse_args(["--config_file", str(EXAMPLES / example), "train.py"])
    settings, defaults, _ = _validate_launch_command(parsed)
    if settings.use_deepspeed:
        settings.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, whole = prepare_deepspeed_cmd_env(settings)
    else:
        whole = prepare_multi_gpu_env(settings)
    given = {name: value for name, value in whole.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    return {**given, "ACCELERATE_MIXED_PRECISION": "no", "DS_ACCELERATOR": "cpu"}


def _recipes(tiny_recipe: Recipe, records: Path, *, quantize: Quantization | None) -> dict[str, Recipe]:
    """Return a recipe of both stages, and one of (Q)LoRA to be interrupted; every third record has no image."""
    raw = json.loads(Path(str(tiny_recipe.stages[0].data.records)).read_text())
    for number, record in enumerate(raw):
        if number % 3 == 0:
            del record["image"]
            record["conversations"][0]["value"] = record["conversations"][0]["value"].replace("<image>", "").strip()
    records.write_text(json.dumps(raw))
    data = dataclasses.replace(tiny_recipe.stages[0].data, records=str(records))
    one, two = (
        dataclasses.replace(
            stage, data=data, max_steps=3, micro_batch_size=1, probe=dataclasses.replace(stage.probe, images=1)
        )
        for stage in tiny_recipe.stages
    )
    lora = dataclasses.replace(two, tune=Lora(rank=4, alpha=8, dropout=0.0), max_steps=4, gradient_checkpointing=False)
    return {
        "plain": dataclasses.replace(tiny_recipe, stages=(one, two)),
        "resumed": dataclasses.replace(
            tiny_recipe, stages=(lora,), model=dataclasses.replace(tiny_recipe.model, quantize=quantize)
        ),
    }


def _launch(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launch, "-m", "tests.training.sharded", str(folder)],
        env={**os.environ, **environment}, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
        timeout=600,
    )  # fmt: skip


def _losses(run_folder: Path, stage: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_folder / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_shards_equal_one_process(engine: str, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipes = _recipes(tiny_recipe, tmp_path / "records.json", quantize="nf4" if engine == "FSDP2" else None)
    for name, recipe in recipes.items():
        run(dataclasses.replace(recipe, output_dir=str(tmp_path / "whole" / name)), ShardCounter(None))
        sharded = dataclasses.replace(recipe, output_dir=str(tmp_path / "sharded" / name))
        (tmp_path / f"{name}.yaml").write_text(dump_recipe(sharded))
    done = _launch(tmp_path, **_environment(ENGINES[engine]))
    assert done.returncode == 0, done.stderr[-3000:]
    for name, recipe in recipes.items():
        for rank in ("0", "1"):
            shards = json.loads((tmp_path / f"{name}.{rank}.json").read_text())
            # Generation before the first step leaves the root's shards gathered until its first backward pass.
            assert all(0 < here <= 0.6 * whole for here, whole in shards[1:]), shards
        for stage in recipe.stages:
            expected = _losses(tmp_path / "whole" / name, stage.name)
            assert _losses(tmp_path / "sharded" / name, stage.name) == pytest.approx(expected, rel=1e-5)
    for file in ("plain/stage1/model/mm_projector.safetensors", "plain/model/model.safetensors"):
        _assert_close(tmp_path / "sharded" / file, tmp_path / "whole" / file)
    _assert_close(*(tmp_path / which / "resumed/adapter/adapter_model.safetensors" for which in ("sharded", "whole")))


def _assert_close(path: Path, other: Path) -> None:
    ours, theirs = load_file(path), load_file(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-4)
