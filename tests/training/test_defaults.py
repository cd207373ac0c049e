"""Defaults that save a night: checkpoints by time, and a few held-out records, which a run keeps that it began with."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainerControl, TrainerState

from llavar_peft import (
    DataConfig,
    Recipe,
    Trainer,
    build_model,
    full_finetuning,
    load_recipe,
    lora,
    projector_pretraining,
)
from llavar_peft.data.training_dataset import count_held_out, split_holdout
from llavar_peft.errors import InterruptedRunError
from llavar_peft.training import trainer, trainer_callbacks
from llavar_peft.training.trainer import run_recipe
from llavar_peft.training.trainer_callbacks import SaveByTime
from tests.training.test_resume import SignalAt


class Clock:
    """A clock that the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def _saved_steps(durations: list[float], *, first: int = 0, seconds: float = 1800.0) -> list[int]:
    """Return after which steps a checkpoint is requested, if the steps take these times."""
    clock, state, control = Clock(), TrainerState(), TrainerControl()
    state.global_step, state.max_steps = first, first + len(durations)
    callback, saved = SaveByTime(seconds, clock), []
    for duration in durations:
        control.should_save = False
        callback.on_step_begin(None, state, control)
        clock.now += duration
        state.global_step += 1
        callback.on_step_end(None, state, control)
        if control.should_save:
            saved.append(state.global_step)
    return saved


@pytest.mark.parametrize("first", [0, 1000])
def test_a_checkpoint_is_saved_about_every_30_minutes(first: int) -> None:
    assert _saved_steps([60.0] * 100, first=first) == [first + step for step in (30, 60, 90)]


def test_a_slow_first_step_does_not_count() -> None:
    """A compilation takes minutes once; the first checkpoint comes 30 minutes after the start all the same."""
    assert _saved_steps([600.0] + [60.0] * 60) == [21, 51]


def test_the_interval_follows_the_duration_of_the_steps() -> None:
    assert _saved_steps([10.0] * 180 + [30.0] * 300)[:3] == [180, 240, 300]


def test_steps_longer_than_the_interval_are_each_saved() -> None:
    assert _saved_steps([4000.0] * 4) == [2, 3]  # the last step's result is saved anyway


def test_the_ranks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all ranks together plan counts, not this rank's clock; they exchange it only when a plan is made."""
    plans = iter([28, 24, 0, 29])
    monkeypatch.setattr(trainer_callbacks, "largest_of_ranks", lambda steps: next(plans))
    assert _saved_steps([1.0] * 59) == [30]
    assert list(plans) == []


def test_a_run_saves_by_time_and_an_explicit_number_is_exact(
    tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    original = trainer.StageTrainer.save_checkpoint

    def save(self: Any) -> None:
        written.append(self.state.global_step)
        original(self)

    monkeypatch.setattr(trainer.StageTrainer, "save_checkpoint", save)
    monkeypatch.setattr(trainer, "SaveByTime", lambda: SaveByTime(0.0))
    stage = dataclasses.replace(tiny_recipe.stages[0], max_steps=4)
    results = []
    for every, steps in ((None, [2, 3]), (3, [3, 4]), (100, [4])):  # a number also saves at the last step
        written.clear()
        changed = dataclasses.replace(stage, save_every_steps=every)
        recipe = dataclasses.replace(tiny_recipe, stages=(changed,), output_dir=str(tmp_path / str(every)))
        results.append((run_recipe(recipe) / "mm_projector.safetensors").read_bytes())
        assert written == steps
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    ("count", "held"), [(1, 0), (18, 0), (99, 0), (100, 2), (150, 3), (1000, 20), (3200, 64), (422_000, 64)]
)
def test_the_automatic_number_of_held_out_records(count: int, held: int) -> None:
    assert count_held_out(count, None) == held
    kept, out = split_holdout(count, None, seed=0)
    assert (len(kept), len(out)) == (count - held, held)


def test_the_recipes_of_the_paper_train_on_all_records() -> None:
    for name in ("llavar-13b", "llavar-7b"):
        assert [stage.data.holdout for stage in load_recipe(name).stages] == [0, 0]
    data = DataConfig(records="r.json")
    assert (projector_pretraining(data).data.holdout, full_finetuning(data).data.holdout) == (0, 0)
    assert full_finetuning(dataclasses.replace(data, holdout=8.0)).data.holdout == 8
    assert lora(data).data.holdout is None


def test_a_run_keeps_the_held_out_records_that_it_began_with(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """A run of an earlier version, which held out nothing by default, is resumed with the same records."""
    data = dataclasses.replace(tiny_recipe.stages[0].data, records=_repeat(tiny_recipe, tmp_path), holdout=0.0)
    stage = dataclasses.replace(tiny_recipe.stages[0], data=data, max_steps=3, save_every_steps=1)
    began = dataclasses.replace(tiny_recipe, stages=(stage,))
    with pytest.raises(InterruptedRunError):
        _run(began, SignalAt(1, signal.SIGINT))
    automatic = dataclasses.replace(began, stages=(_with_holdout(stage, None),))
    run_recipe(automatic)
    written = yaml.safe_load((Path(began.output_dir) / "recipe.yaml").read_text())
    assert written["stages"][0]["data"]["holdout"] == 0
    lines = (Path(began.output_dir) / stage.name / "metrics.jsonl").read_text().splitlines()
    whole = dataclasses.replace(began, output_dir=str(tmp_path / "whole"))
    run_recipe(whole)
    expected = (Path(whole.output_dir) / stage.name / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [json.loads(line)["loss"] for line in expected]
    # A new run of the same recipe holds out two of its 108 records.
    fresh = dataclasses.replace(automatic, output_dir=str(tmp_path / "fresh"))
    run_recipe(fresh)
    assert (Path(fresh.output_dir) / stage.name / "probe.jsonl").is_file()


def _with_holdout(stage: Any, holdout: float | None) -> Any:
    return dataclasses.replace(stage, data=dataclasses.replace(stage.data, holdout=holdout))


def _repeat(recipe: Recipe, folder: Path) -> str:
    records = json.loads(Path(str(recipe.stages[0].data.records)).read_text())
    path = folder / "many.json"
    path.write_text(json.dumps([{**one, "id": f"{one['id']}-{turn}"} for turn in range(6) for one in records]))
    return str(path)


def _run(recipe: Recipe, callback: Any) -> None:
    Trainer(*build_model(recipe.model, seed=recipe.seed), recipe, callbacks=[callback]).train()
