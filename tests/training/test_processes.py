"""Two processes give the losses and the weights of one."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llavar_peft import Recipe
from llavar_peft.config import LossAverage
from llavar_peft.recipes import dump_recipe


@pytest.mark.parametrize("average", ["token", "micro_batch"])
def test_two_processes_equal_one(average: LossAverage, tiny_recipe: Recipe, tmp_path: Path) -> None:
    stages = tuple(dataclasses.replace(stage, loss_average=average, max_steps=3) for stage in tiny_recipe.stages)
    for processes in (1, 2):
        output = tmp_path / str(processes)
        recipe = dataclasses.replace(tiny_recipe, stages=stages, output_dir=str(output))
        (tmp_path / f"{processes}.yaml").write_text(dump_recipe(recipe))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [*launch, "-m", "llavar_peft", "train", str(tmp_path / f"{processes}.yaml")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    for stage in stages:
        one, two = (
            [json.loads(line) for line in (tmp_path / n / stage.name / "metrics.jsonl").read_text().splitlines()]
            for n in ("1", "2")
        )
        assert [line["tokens"] for line in two] == [line["tokens"] for line in one]
        assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    ours, theirs = (load_file(tmp_path / n / "model/model.safetensors") for n in ("2", "1"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=1e-4)
