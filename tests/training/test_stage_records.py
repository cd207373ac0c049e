"""What is wrong with a stage's data is said once, and before the model is loaded."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from llavar_peft import DataConfig, Lora, Recipe, Trainer, build_model
from llavar_peft.errors import ConfigError, LlavarError
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.recipe.resolution import describe_resolution, resolution_from
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


def _with_letters(recipe: Recipe, folder: Path, heights: list[float | None]) -> Recipe:
    """Return a recipe whose records state the heights of their letters, one after the other."""
    data = recipe.stages[0].data
    rows = json.loads(Path(str(data.records)).read_text())
    for number, row in enumerate(rows):
        row["text_height"] = heights[number % len(heights)]
        del row["box"]
    (folder / "letters.json").write_text(json.dumps(rows))
    return _with_data(recipe, records=str(folder / "letters.json"))


@pytest.mark.parametrize(
    ("heights", "share"),
    [([8.0], "100 %"), ([8.0, 8.0, None, 90.0], ""), ([90.0, 90.0, 8.0], None), ([None], None)],
)
def test_text_that_cannot_be_read_is_reported_once(
    heights: list[float | None], share: str | None, tiny_recipe: Recipe, tmp_path: Path, caplog: Any
) -> None:
    """A letter of 8 pixels in an image of 192 to 448 has 2 to 5 in the tower's input of 120."""
    recipe = _with_letters(tiny_recipe, tmp_path, heights)
    _, processor = build_model(recipe.model)
    state = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()
    stage_records(recipe.stages[0], processor, seed=recipe.seed)
    assert state == (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes())
    said = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    if share is None:
        assert said == []
        return
    (message,) = said
    assert message.startswith(f"stage stage1: {share}")
    line = message.partition("set under model: ")[2].partition(" (")[0]
    higher = describe_resolution(resolution_from(yaml.safe_load(line)["resolution"], "recipe"))
    caplog.clear()
    parts = processor.image_processor, processor.tokenizer
    stage_records(
        recipe.stages[0], LlavarProcessor(*parts, patch_size=processor.patch_size, resolution=higher), seed=recipe.seed
    )
    assert "cannot be read" not in caplog.text


@pytest.mark.parametrize(
    ("template", "text", "said"),
    [
        ("llava_v1", "<image>\nWhat is it?", "before the question in 24 of 24 records"),
        ("llava_v1", "What is it?\n<image>", None),
        ("vicuna_v1", "What is it?\n<image>", None),
    ],
)
def test_images_that_never_stand_where_they_are_asked_about_are_reported(
    template: Any, text: str, said: str | None, tiny_recipe: Recipe, tmp_path: Path, caplog: Any
) -> None:
    """A model that only saw the image first ignored the questions of 'ask', which precede the image."""
    _, made = build_model(tiny_recipe.model)
    processor = LlavarProcessor(
        made.image_processor, made.tokenizer, patch_size=made.patch_size, use_im_start_end=False, template=template
    )
    rows = json.loads(Path(str(tiny_recipe.stages[0].data.records)).read_text())
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "A"}]
    repeated = [{**rows[number % len(rows)], "id": str(number), "conversations": turns} for number in range(24)]
    (tmp_path / "order.json").write_text(json.dumps(repeated))
    recipe = _with_data(tiny_recipe, records=str(tmp_path / "order.json"), holdout=None)
    stage_records(recipe.stages[0], processor, seed=recipe.seed)
    found = [record.getMessage() for record in caplog.records if "the image stands" in record.getMessage()]
    assert len(found) == (said is not None)
    assert all(said in message for message in found if said)
