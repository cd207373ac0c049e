"""What is wrong with a stage's data is said once, and before the model is loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llavar_peft import DataConfig, Lora, Recipe, Trainer, build_model
from llavar_peft.errors import ConfigError, LlavarError
from llavar_peft.training import dry_run, trainer
from llavar_peft.training.stage_records import stage_records


def _with_data(recipe: Recipe, **settings: Any) -> Recipe:
    stage = recipe.stages[0]
    return dataclasses.replace(
        recipe, stages=(dataclasses.replace(stage, data=dataclasses.replace(stage.data, **settings)),)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"records": ("gone.json",)}, "gone.json: no such file"),
        ({"images": ("gone",)}, "gone: is not a folder of images"),
    ],
)
def test_missing_data_is_found_before_the_model_is_loaded(
    settings: dict[str, Any], message: str, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the model is loaded")

    monkeypatch.setattr(trainer, "build_for_training", load)
    monkeypatch.setattr(dry_run, "start_processes", load)
    recipe = _with_data(tiny_recipe, **settings)
    with pytest.raises(LlavarError, match=message):
        trainer.run_recipe(recipe)
    with pytest.raises(LlavarError, match=message):
        list(dry_run.dry_run(recipe))


def test_a_setting_that_is_missing_is_one_message(tiny_recipe: Recipe, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Read.\n<image>"}, {"from": "gpt", "value": "Nothing."}]
    rows = [{"id": str(number), "image": f"{number}.png", "conversations": turns} for number in range(20)]
    (tmp_path / "records.json").write_text(json.dumps(rows))
    stage = dataclasses.replace(tiny_recipe.stages[0], data=DataConfig(records=str(tmp_path / "records.json")))
    processor: Any = None  # nothing is encoded
    with pytest.raises(LlavarError) as caught:
        stage_records(stage, processor, seed=0)
    assert str(caught.value) == (
        f"stages.{stage.name}.data.images: not set, and 20 of 20 records name an image. "
        "Fix: set it to the folder that the image paths start from."
    )


def test_a_model_that_the_recipe_does_not_describe_is_rejected(tiny_recipe: Recipe, tmp_path: Path) -> None:
    model, processor = build_model(tiny_recipe.model)
    stage = dataclasses.replace(tiny_recipe.stages[0], tune=Lora(rank=2), max_steps=1)
    recipe = dataclasses.replace(tiny_recipe, stages=(stage,))
    quantized = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, quantize="nf4"))
    with pytest.raises(ConfigError, match="is not quantized, and the recipe's model\\.quantize is nf4"):
        Trainer(model, processor, quantized)
    swapped: Any = processor
    with pytest.raises(ConfigError, match=r"expected a LLaVAR without adapters \(got LlavarProcessor\)"):
        Trainer(swapped, processor, recipe)
    Trainer(model, processor, recipe).train("stage1")
    with pytest.raises(ConfigError, match="got one with adapters"):
        Trainer(model, processor, dataclasses.replace(recipe, output_dir=str(tmp_path / "again")))
