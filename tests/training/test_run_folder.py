"""A run's folder belongs to one recipe, and is checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from llavar_peft import ModelConfig, Recipe, Tiles
from llavar_peft.errors import ConfigError, EnvironmentFaultError
from llavar_peft.models.build_model import quantization_arguments, resolve_dtype
from llavar_peft.recipe.validate import validate_recipe
from llavar_peft.training.run_folder import RunFolder
from llavar_peft.training.trainer import run_recipe


def _finish(recipe: Recipe) -> RunFolder:
    """Make the folder of a run whose stages are finished, as far as another run can see."""
    run = RunFolder(recipe)
    run.open(restart=False, stages=recipe.stages)
    for stage in recipe.stages:
        run.result(stage).mkdir(parents=True)
        run.mark_finished(stage, steps=4)
    return run


def test_another_recipe_does_not_overwrite_a_run(tiny_recipe: Recipe) -> None:
    run = _finish(tiny_recipe)
    page = run.root / "recipe.yaml"
    before = page.read_text()
    renamed = tuple(dataclasses.replace(stage, name=f"my_{stage.name}") for stage in tiny_recipe.stages)
    other = dataclasses.replace(tiny_recipe, stages=renamed)
    for restart in (False, True):
        with pytest.raises(ConfigError, match="holds the run of another recipe"):
            RunFolder(other).open(restart=restart, stages=renamed, allow_changes=True)
    assert page.read_text() == before
    run.open(restart=False, stages=tiny_recipe.stages)


@pytest.mark.parametrize("change", [{"max_steps": 9}, {"epochs": 7.0}])
def test_more_steps_for_a_finished_stage_are_rejected(change: dict[str, float], tiny_recipe: Recipe) -> None:
    _finish(tiny_recipe)
    longer = dataclasses.replace(tiny_recipe.stages[-1], **change)
    recipe = dataclasses.replace(tiny_recipe, stages=(*tiny_recipe.stages[:-1], longer))
    with pytest.raises(ConfigError, match="cannot be continued with another number of steps"):
        RunFolder(recipe).open(restart=False, stages=recipe.stages, allow_changes=True)


@pytest.mark.parametrize("change", [{"resolution": Tiles(max_tiles=2)}, {"projector_type": "mlp2x_gelu"}])
def test_a_run_is_not_continued_with_a_model_of_other_weights(change: dict[str, Any], tiny_recipe: Recipe) -> None:
    _finish(tiny_recipe)
    recipe = dataclasses.replace(tiny_recipe, model=dataclasses.replace(tiny_recipe.model, **change))
    with pytest.raises(ConfigError, match=f"model of other weights\n  model\\.{next(iter(change))}"):
        RunFolder(recipe).open(restart=False, stages=recipe.stages, allow_changes=True)


def test_an_output_folder_is_checked_before_the_model_is_loaded(tiny_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    absent = ModelConfig(language_model=str(tmp_path / "none"), vision_tower=str(tmp_path / "none"))
    for path, error in (
        (tmp_path / "file", ConfigError),
        (tmp_path / "file/inside", ConfigError),
        (Path("/proc/llavar"), EnvironmentFaultError),
    ):
        recipe = dataclasses.replace(tiny_recipe, model=absent, output_dir=str(path))
        with pytest.raises(error, match="output_dir"):
            run_recipe(recipe)


def test_a_tilde_is_the_home_in_every_path(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    stage = tiny_recipe.stages[0]
    data = dataclasses.replace(stage.data, records=("~/a.json", "b.json"), images="~/images")
    model = ModelConfig(language_model="~/vicuna", vision_tower="owner/clip", projector="~/p.bin")
    recipe = validate_recipe(
        dataclasses.replace(
            tiny_recipe, model=model, output_dir="~/run", stages=(dataclasses.replace(stage, data=data),)
        )
    )
    data = recipe.stages[0].data
    home = os.path.expanduser("~")
    assert (recipe.output_dir, data.records, data.images) == (
        f"{home}/run", (f"{home}/a.json", "b.json"), f"{home}/images",
    )  # fmt: skip
    assert (recipe.model.language_model, recipe.model.vision_tower) == (f"{home}/vicuna", "owner/clip")


def test_an_unknown_quantization_is_rejected() -> None:
    with pytest.raises(ConfigError, match="got 'nf5', expected 'nf4' or 'int8'"):
        quantization_arguments("nf5", resolve_dtype("float32"))  # type: ignore[arg-type]
