"""A dry run trains on the longest records and leaves no files behind."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from llavar_peft import ModelConfig, Recipe, cli
from llavar_peft.errors import ConfigError, MissingDependencyError
from llavar_peft.recipe.recipe_yaml import dump_recipe
from llavar_peft.training.dry_run import dry_run
from llavar_peft.training.trainer import run_recipe


@pytest.mark.slow
def test_each_stage_is_tried_on_its_longest_records(
    tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = json.loads(Path(str(tiny_recipe.stages[0].data.records)).read_text())
    records[5]["conversations"][1]["value"] = "long " * 300
    (tmp_path / "records.json").write_text(json.dumps(records))
    stages = tuple(
        dataclasses.replace(stage, data=dataclasses.replace(stage.data, records=str(tmp_path / "records.json")))
        for stage in tiny_recipe.stages
    )
    recipe = dataclasses.replace(tiny_recipe, stages=stages)
    (tmp_path / "mine.yaml").write_text(dump_recipe(recipe))
    before = sorted(path.name for path in tmp_path.iterdir())
    assert cli.main(["train", str(tmp_path / "mine.yaml"), "--dry-run"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    output = capsys.readouterr().out
    assert all(stage.name in output for stage in stages)
    assert "GB free" in output

    (trial,) = dry_run(recipe, ("stage2",))  # without stage 1's result
    assert trial.longest > 300
    assert trial.tokens > trial.longest
    assert trial.steps == 4
    assert trial.projected > trial.seconds > 0
    assert trial.checkpoint_bytes > trial.result_bytes > 10**6
    assert trial.peak_bytes > 10**8


def test_an_error_that_would_stop_the_run_stops_the_dry_run(tiny_recipe: Recipe, tmp_path: Path) -> None:
    data = dataclasses.replace(tiny_recipe.stages[0].data, images=str(tmp_path / "nowhere"))
    recipe = dataclasses.replace(tiny_recipe, stages=(dataclasses.replace(tiny_recipe.stages[0], data=data),))
    (tmp_path / "mine.yaml").write_text(dump_recipe(recipe))
    assert cli.main(["train", str(tmp_path / "mine.yaml"), "--dry-run"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_missing_tracker_is_found_before_the_model_is_loaded(tiny_recipe: Recipe) -> None:
    absent = next(name for name in ("clearml", "neptune", "swanlab") if find_spec(name) is None)
    recipe = dataclasses.replace(
        tiny_recipe,
        report_to=(absent,),
        model=ModelConfig(language_model="/nonexistent", vision_tower="/nonexistent"),
    )
    with pytest.raises(MissingDependencyError, match=f"{absent} is not installed. Fix: pip install"):
        run_recipe(recipe)
    with pytest.raises(ConfigError, match="unknown tracker"):
        run_recipe(dataclasses.replace(recipe, report_to=("tensorbord",)))
