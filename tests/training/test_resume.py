"""A run that is interrupted and resumed equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llavar_peft import CrossAttention, Full, Lora, ModelConfig, Projector, Recipe, Tiles, Trainer, build_model
from llavar_peft.errors import ConfigError, InterruptedRunError
from llavar_peft.recipe.schema import Tune


class SignalAt(TrainerCallback):  # type: ignore[misc]
    """Sends this process a real signal in the middle of a run."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step = step
        self.number = number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def _train(recipe: Recipe, callbacks: tuple[TrainerCallback, ...] = (), *, allow_changes: bool = False) -> Path:
    model, processor = build_model(recipe.model, seed=recipe.seed)
    return Trainer(model, processor, recipe, callbacks=callbacks).train(allow_changes=allow_changes)


def _figures(recipe: Recipe, stage: str) -> list[tuple[int, float, float]]:
    lines = (Path(recipe.output_dir) / stage / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"], line["grad_norm"]) for line in map(json.loads, lines)]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    found = sorted(folder.glob("*.safetensors"))
    assert found
    return {f"{path.name}:{name}": tensor for path in found for name, tensor in load_file(path).items()}


TUNES: dict[str, Tune] = {
    "projector": Projector(),
    "full": Full(),
    "lora": Lora(rank=4, alpha=8, dropout=0.1),
    "pissa": Lora(rank=4, alpha=8, dropout=0.1, variant="pissa"),
    "crossed": Projector(),
    "tiles": Lora(rank=4, alpha=8, dropout=0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "workers"), [("projector", 0), ("full", 2), ("lora", 0), ("pissa", 0), ("tiles", 2), ("crossed", 0)]
)
def test_an_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    kind: str, workers: int, tiny_recipe: Recipe, short_model: ModelConfig, tmp_path: Path
) -> None:
    stage = tiny_recipe.stages[0]
    stage = dataclasses.replace(
        stage, tune=TUNES[kind], epochs=2, max_steps=None, data=dataclasses.replace(stage.data, workers=workers)
    )
    resolution = {"tiles": Tiles(max_tiles=2), "crossed": CrossAttention(grid=2)}.get(kind)
    model = dataclasses.replace(short_model if kind == "crossed" else tiny_recipe.model, resolution=resolution)
    whole = dataclasses.replace(tiny_recipe, model=model, stages=(stage,), output_dir=str(tmp_path / "whole"))
    halved = dataclasses.replace(whole, output_dir=str(tmp_path / "halved"))
    expected = _weights(_train(whole))

    steps = len(_figures(whole, stage.name))
    assert steps >= 6
    # In the middle of an epoch, and again in the next one.
    for step, number in ((steps // 3, signal.SIGINT), (steps - 2, signal.SIGTERM)):
        with pytest.raises(InterruptedRunError) as stopped:
            _train(halved, (SignalAt(step, number),))
        assert stopped.value.exit_code == 4
    result = _train(halved)

    assert _figures(halved, stage.name) == _figures(whole, stage.name)
    ours = _weights(result)
    assert sorted(ours) == sorted(expected)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    left = [path.name for path in Path(halved.output_dir).rglob(".*")]
    assert left == []


@pytest.mark.slow
def test_the_second_stage_resumes_from_the_result_of_the_first(tiny_recipe: Recipe, tmp_path: Path) -> None:
    whole = dataclasses.replace(tiny_recipe, output_dir=str(tmp_path / "whole"))
    halved = dataclasses.replace(tiny_recipe, output_dir=str(tmp_path / "halved"))
    expected = _weights(_train(whole))
    first, second = tiny_recipe.stages

    class InSecond(SignalAt):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if Path(args.output_dir).name == second.name:
                super().on_step_begin(args, state, control, **kwargs)

    with pytest.raises(InterruptedRunError, match=second.name):
        _train(halved, (InSecond(2, signal.SIGINT),))
    before = (Path(halved.output_dir) / first.name / "metrics.jsonl").read_bytes()
    ours = _weights(_train(halved))
    assert (Path(halved.output_dir) / first.name / "metrics.jsonl").read_bytes() == before
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_an_incomplete_page_is_written_again(tiny_recipe: Recipe) -> None:
    _train(tiny_recipe)
    root = Path(tiny_recipe.output_dir)
    page = (root / "index.html").read_bytes()
    (root / ".index.html.part").write_bytes(page[:100])
    (root / "index.html").unlink()
    _train(tiny_recipe)
    assert (root / "index.html").stat().st_size > len(page) / 2
    assert not (root / ".index.html.part").exists()


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(tiny_recipe: Recipe) -> None:
    result = _train(tiny_recipe)
    written = {path: path.stat().st_mtime_ns for path in result.rglob("*") if path.is_file()}
    assert _train(tiny_recipe) == result
    assert {path: path.stat().st_mtime_ns for path in result.rglob("*") if path.is_file()} == written


@pytest.mark.slow
def test_another_recipe_in_the_same_folder_is_rejected_with_the_difference(tiny_recipe: Recipe) -> None:
    _train(tiny_recipe)
    first, second = tiny_recipe.stages
    changed = dataclasses.replace(first, optim=dataclasses.replace(first.optim, learning_rate=0.5))
    with pytest.raises(ConfigError, match=r"stages\.0\.optim\.learning_rate.*0\.5"):
        _train(dataclasses.replace(tiny_recipe, stages=(changed, second)))


def test_a_stage_that_needs_a_missing_result_is_rejected(tiny_recipe: Recipe) -> None:
    model, processor = build_model(tiny_recipe.model)
    with pytest.raises(ConfigError, match="has not run"):
        Trainer(model, processor, tiny_recipe).train([tiny_recipe.stages[1].name])


@pytest.mark.slow
def test_stages_can_be_run_one_by_one(tiny_recipe: Recipe, tmp_path: Path) -> None:
    at_once = dataclasses.replace(tiny_recipe, output_dir=str(tmp_path / "at_once"))
    expected = _weights(_train(at_once))
    for stage in tiny_recipe.stages:
        model, processor = build_model(tiny_recipe.model, seed=tiny_recipe.seed)
        result = Trainer(model, processor, tiny_recipe).train([stage.name])
    ours = _weights(result)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize("first", [Projector(), Full()], ids=["projector", "full"])
def test_stages_on_a_base_in_half_precision_can_be_run_one_by_one(
    first: Tune, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """What was trained is float32 in memory, and may not be rounded when it is loaded again."""
    stages = [dataclasses.replace(stage, precision="bf16", max_steps=2) for stage in tiny_recipe.stages]
    recipe = dataclasses.replace(
        tiny_recipe,
        model=dataclasses.replace(tiny_recipe.model, dtype="bfloat16"),
        stages=(dataclasses.replace(stages[0], tune=first), stages[1]),
    )
    expected = _weights(_train(dataclasses.replace(recipe, output_dir=str(tmp_path / "at_once"))))
    for stage in recipe.stages:
        model, processor = build_model(recipe.model, seed=recipe.seed)
        result = Trainer(model, processor, recipe).train([stage.name])
    ours = _weights(result)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
