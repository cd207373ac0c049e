"""FSDP2 and ZeRO-3 on two processes give the losses and whole weights of one; and they do shard, not DDP by name."""

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
from llavar_peft.recipes import dump_recipe
from tests.training.sharded import Look, run

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}

ZERO_3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "DS_ACCELERATOR": "cpu",
}


def _recipes(tiny_recipe: Recipe, records: Path) -> dict[str, Recipe]:
    """Both stages, and LoRA with a break in the middle; every third record has no picture."""
    told = json.loads(Path(str(tiny_recipe.stages[0].data.records)).read_text())
    for number, record in enumerate(told):
        if number % 3 == 0:
            del record["image"]
            record["conversations"][0]["value"] = record["conversations"][0]["value"].replace("<image>", "").strip()
    records.write_text(json.dumps(told))
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
        "resumed": dataclasses.replace(tiny_recipe, stages=(lora,)),
    }


def _launch(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.run(
        [*launch, "-m", "tests.training.sharded", str(folder)],
        env={**os.environ, **environment}, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip


def _losses(run_folder: Path, stage: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_folder / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("engine", ["FSDP2", "ZeRO-3"])
def test_two_shards_equal_a_whole(engine: str, tiny_recipe: Recipe, tmp_path: Path) -> None:
    if engine == "ZeRO-3":
        pytest.importorskip("deepspeed")
    recipes = _recipes(tiny_recipe, tmp_path / "records.json")
    for name, recipe in recipes.items():
        run(dataclasses.replace(recipe, output_dir=str(tmp_path / "whole" / name)), Look(None))
        sharded = dataclasses.replace(recipe, output_dir=str(tmp_path / "sharded" / name))
        (tmp_path / f"{name}.yaml").write_text(dump_recipe(sharded))
    done = _launch(tmp_path, **(FSDP if engine == "FSDP2" else ZERO_3))
    assert done.returncode == 0, done.stderr[-3000:]
    for name, recipe in recipes.items():
        for rank in ("0", "1"):
            shards = json.loads((tmp_path / f"{name}.{rank}.json").read_text())
            # Answers drawn before the first step leave the root's shards gathered until its first backward pass.
            assert all(0 < here <= 0.6 * whole for here, whole in shards[1:]), shards
        for stage in recipe.stages:
            wanted = _losses(tmp_path / "whole" / name, stage.name)
            assert _losses(tmp_path / "sharded" / name, stage.name) == pytest.approx(wanted, rel=1e-5)
    for file in ("plain/stage1/model/mm_projector.safetensors", "plain/model/model.safetensors"):
        _assert_close(tmp_path / "sharded" / file, tmp_path / "whole" / file)
    _assert_close(*(tmp_path / which / "resumed/adapter/adapter_model.safetensors" for which in ("sharded", "whole")))


def _assert_close(path: Path, other: Path) -> None:
    ours, theirs = load_file(path), load_file(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-4)


def test_the_first_version_is_refused_where_it_would_be_ddp(tiny_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(dump_recipe(dataclasses.replace(tiny_recipe, output_dir=str(tmp_path / "run"))))
    done = _launch(tmp_path, **{**FSDP, "FSDP_VERSION": "1"})
    assert done.returncode != 0
    assert "FSDP's first version needs GPUs" in done.stderr
