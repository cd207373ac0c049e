"""A run that is killed repeatedly gives the result of an undisturbed one, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llavar_peft import Full, Lora, ModelConfig, Projector, Recipe
from llavar_peft.recipe.recipe_yaml import dump_recipe
from llavar_peft.recipe.schema import Tune
from tests.training.conftest import short_model, tiny_data, tiny_model, tiny_recipe

__all__ = ["short_model", "tiny_data", "tiny_model", "tiny_recipe"]

KILLS = int(os.environ.get("LLAVAR_TORTURE_KILLS", "9"))
KINDS: dict[str, tuple[Tune, str | None, int]] = {
    "projector": (Projector(), None, 0),
    "full": (Full(), None, 1),
    "lora": (Lora(rank=4, alpha=8.0, dropout=0.1), None, 0),
    "qlora": (Lora(rank=4, alpha=8.0, dropout=0.1), "nf4", 0),
}
if os.environ.get("LLAVAR_TORTURE_MATRIX") != "all":
    del KINDS["projector"], KINDS["lora"]  # adapters are saved with the projector, and alike on a quantized base


def _figures(run: Path) -> list[tuple[Any, ...]]:
    lines = (json.loads(line) for line in (run / "stage1/metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"], line["tokens"]) for line in lines]


@pytest.mark.slow
@pytest.mark.torture
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("kind", KINDS)
def test_kills_at_random_moments_do_not_change_the_result(
    kind: str, short_model: ModelConfig, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    tune, quantize, workers = KINDS[kind]
    stage = tiny_recipe.stages[0]
    stage = dataclasses.replace(
        stage, tune=tune, epochs=2, save_every_steps=1, data=dataclasses.replace(stage.data, workers=workers)
    )
    model = dataclasses.replace(short_model, quantize=quantize)
    run = tmp_path / "run"
    recipe = dataclasses.replace(tiny_recipe, model=model, stages=(stage,), output_dir=str(run))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    number = list(KINDS).index(kind)
    count = KILLS // len(KINDS) + (number < KILLS % len(KINDS))
    command = [sys.executable, "-m", "tests.fast_start", "tests.torture.killer", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(
        [*command, str(count), str(number)], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["in a save"] >= 2
    assert report["in a save"] + report["at a time"] == count

    whole = tmp_path / "run-whole"
    result = "adapter/adapter_model.safetensors" if isinstance(tune, Lora) else "model/model.safetensors"
    expected = load_file(whole / result)
    ended = [path for path in tmp_path.glob("run*") if path != whole]
    assert ended
    for path in ended:
        assert _figures(path) == _figures(whole)
        weights = load_file(path / result)
        assert sorted(weights) == sorted(expected)
        assert all(torch.equal(weights[name], one) for name, one in expected.items())
        left = [one.name for one in path.rglob("*") if one.name.startswith((".", "checkpoint-"))]
        assert left == []
