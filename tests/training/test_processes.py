"""Several processes give the losses and weights of one; a run survives the death of a rank without losing a step."""

from __future__ import annotations

import dataclasses
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llavar_peft import Full, ModelConfig, Recipe
from llavar_peft.recipe.recipe_yaml import dump_recipe
from tests.commands import ranks, run_command
from tests.training import sharded
from tests.training.sharded import ShardCounter, run

ROOT = Path(__file__).parents[2]


def _assert_same(ours: Path, theirs: Path, recipe: Recipe, *, rounding: float = 1e-5) -> None:
    for stage in recipe.stages:
        two, one = (
            [json.loads(line) for line in (folder / stage.name / "metrics.jsonl").read_text().splitlines()]
            for folder in (ours, theirs)
        )
        assert [line["tokens"] for line in two] == [line["tokens"] for line in one]
        assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=rounding)
    found, expected = (load_file(folder / "model/model.safetensors") for folder in (ours, theirs))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=rounding, rtol=10 * rounding)


@pytest.mark.slow
def test_two_processes_equal_one(short_model: ModelConfig, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipes = {}
    tower = dataclasses.replace(tiny_recipe.stages[1], tune=Full(train_tower=True), loss_average="token", max_steps=2)
    half = dataclasses.replace(short_model, dtype="bfloat16")
    for average, precision in (("token", "fp32"), ("micro_batch", "fp32"), ("token", "bf16")):
        changes: dict[str, Any] = {"loss_average": average, "precision": precision, "max_steps": 3}
        stages = tuple(dataclasses.replace(stage, **changes) for stage in tiny_recipe.stages)
        model = half if precision == "bf16" else short_model
        name = f"{average}-{precision}"
        one = dataclasses.replace(tiny_recipe, stages=stages, model=model, output_dir=str(tmp_path / "1" / name))
        run(one, ShardCounter(None))
        recipes[name] = dataclasses.replace(one, output_dir=str(tmp_path / "2" / name))
        (tmp_path / f"{name}.yaml").write_text(dump_recipe(recipes[name]))
    # Every other micro batch has no image, so that one of the ranks does not call the tower for one.
    data = dataclasses.replace(tower.data, records=_without_images(str(tower.data.records), tmp_path))
    one = dataclasses.replace(
        tiny_recipe,
        stages=(dataclasses.replace(tower, data=data, micro_batch_size=1),),
        model=short_model,
        output_dir=str(tmp_path / "1/tower"),
    )
    run(one, ShardCounter(None))
    recipes["tower"] = dataclasses.replace(one, output_dir=str(tmp_path / "2/tower"))
    (tmp_path / "tower.yaml").write_text(dump_recipe(recipes["tower"]))
    done = ranks(sharded.main, tmp_path, tmp_path)
    assert [one.status for one in done] == [0, 0], [one.stderr[-2000:] for one in done]
    for name, recipe in recipes.items():
        # The gradients of two records are summed in another order, and rounded to 8 bits before.
        rounding = 5e-3 if "bf16" in name else 1e-5
        _assert_same(tmp_path / "2" / name, tmp_path / "1" / name, recipe, rounding=rounding)


def _without_images(records: str, folder: Path) -> str:
    raw = json.loads(Path(records).read_text())
    for record in raw[::2]:
        del record["image"]
        record["conversations"][0]["value"] = record["conversations"][0]["value"].replace("<image>", "").strip()
    path = folder / "half-without-images.json"
    path.write_text(json.dumps(raw))
    return str(path)


def _launch_nodes(recipe: Path) -> list[subprocess.Popen[str]]:
    """Start two launchers on loopback, as on two nodes, with one rank each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, f"--node_rank={node}",
             "-m", "tests.fast_start", "tests.training.killed_rank", str(recipe)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip


@pytest.mark.slow
def test_two_nodes_stop_when_a_rank_is_killed_and_resume(tiny_recipe: Recipe, tmp_path: Path) -> None:
    stage = dataclasses.replace(tiny_recipe.stages[1], epochs=2, save_every_steps=1)
    one = dataclasses.replace(tiny_recipe, stages=(stage,), output_dir=str(tmp_path / "one"))
    run(one, ShardCounter(None))
    two = dataclasses.replace(one, output_dir=str(tmp_path / "two"))
    (tmp_path / "two.yaml").write_text(dump_recipe(two))
    metrics = tmp_path / "two" / stage.name / "metrics.jsonl"

    for node in (nodes := _launch_nodes(tmp_path / "two.yaml")):
        _, told = node.communicate(timeout=600)  # a node that does not notice waits for the other one forever
        assert node.returncode != 0
        assert metrics.is_file(), told[-2000:]
    assert len(nodes) == 2
    assert not (tmp_path / "two/model").exists()
    assert metrics.read_text().count("\n") == 2

    again = ranks(run_command, ["train", str(tmp_path / "two.yaml")], tmp_path, nodes=2)
    assert [one.status for one in again] == [0, 0], [one.stderr[-2000:] for one in again]
    assert "resumes from step 2" in again[0].stderr
    _assert_same(tmp_path / "two", tmp_path / "one", two)
