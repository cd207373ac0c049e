"""Presets are found by name, completed by overrides, and applied to the last stage of a recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import llavar_peft
from llavar_peft import cli
from llavar_peft.errors import ConfigError
from llavar_peft.recipe.presets import load_recipe, read_recipe
from llavar_peft.recipe.schema import Full, Lora, ModelConfig, OptimConfig, Projector
from llavar_peft.recipe.shipped_recipes import list_presets, list_recipes
from llavar_peft.recipe.stages import projector_pretraining

ROOT = Path(llavar_peft.__file__).parents[1]
REST = ("model.checkpoint=llavar-13b", "stages.0.data.records=r.json", "stages.0.data.images=p", "output_dir=runs/x")
LORA = Lora(rank=64, alpha=128.0, dropout=0.05)
TUNES = {
    "lora": LORA,
    "qlora": LORA,
    "dora": dataclasses.replace(LORA, variant="dora"),
    "rslora": dataclasses.replace(LORA, variant="rslora", alpha=16.0),
    "lora-attention-only": dataclasses.replace(LORA, target="attention"),
    "lora-vllm": dataclasses.replace(LORA, train_projector=False, train_image_rows=False),
    "projector-only": Projector(),
}
LORA_RATES = OptimConfig(learning_rate=2e-4, projector_learning_rate=2e-5)
RATES = {
    **dict.fromkeys(TUNES, LORA_RATES),
    "lora-vllm": OptimConfig(learning_rate=2e-4),
    "projector-only": OptimConfig(learning_rate=2e-3),
}


def test_all_presets_are_listed_and_none_has_the_name_of_a_recipe() -> None:
    assert set(list_presets()) == set(TUNES)
    assert not set(list_presets()) & set(list_recipes())
    assert all(summary.endswith(".") for summary in list_presets().values())


@pytest.mark.parametrize("name", TUNES)
def test_a_preset_alone_is_a_recipe_with_one_stage(name: str) -> None:
    recipe = load_recipe(None, REST, preset=name)
    (stage,) = recipe.stages
    assert recipe.model == ModelConfig(checkpoint="llavar-13b", quantize="nf4" if name == "qlora" else None)
    assert (stage.name, stage.tune) == (name, TUNES[name])
    assert load_recipe(name, REST) == recipe
    if name == "projector-only":  # the paper's stage 1, number for number
        assert stage == projector_pretraining(stage.data, name=name)
    else:
        assert stage.optim == RATES[name]
        assert (stage.epochs, stage.global_batch_size, stage.micro_batch_size, stage.max_length) == (3, 32, 4, 2048)


def test_rslora_has_the_same_scale_as_lora() -> None:
    lora, rslora = TUNES["lora"], TUNES["rslora"]
    assert isinstance(lora, Lora)
    assert isinstance(rslora, Lora)
    assert rslora.alpha / rslora.rank**0.5 == lora.alpha / lora.rank


@pytest.mark.parametrize("name", TUNES)
def test_all_missing_fields_are_reported(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^preset {name}, to be completed by PATH=VALUE: 3 problems\n") as caught:
        load_recipe(preset=name)
    assert {fault.where for fault in caught.value.faults} == {"stages.0.data.records", "output_dir", "model"}
    fixes = {fault.fix for fault in caught.value.faults}
    assert fixes == {"add stages.0.data.records=...", "add output_dir=...", "add model.checkpoint=..."}
    with pytest.raises(ConfigError) as named:
        load_recipe(name)
    assert str(named.value) == str(caught.value)


@pytest.mark.parametrize("name", TUNES)
def test_applied_to_a_recipe_it_changes_only_tune_and_learning_rates_of_the_last_stage(name: str) -> None:
    plain, applied = load_recipe("llavar-13b"), load_recipe("llavar-13b", preset=name)
    assert applied.stages[0] == plain.stages[0]
    before, after = plain.stages[-1], applied.stages[-1]
    assert (before.tune, after.tune) == (Full(), TUNES[name])
    assert after == dataclasses.replace(before, tune=after.tune, optim=RATES[name])
    quantize = "nf4" if name == "qlora" else None
    assert applied == dataclasses.replace(
        plain, model=dataclasses.replace(plain.model, quantize=quantize), stages=applied.stages
    )


def test_a_preset_replaces_all_learning_rates_and_overrides_are_applied_last() -> None:
    over = ["stages.1.tune=lora", "stages.1.optim.rows_learning_rate=1e-3", "stages.1.tune.train_image_rows=true"]
    assert load_recipe("tiny", over).stages[1].optim.rows_learning_rate == 1e-3
    applied = load_recipe("tiny", [*over[2:], "stages.1.tune.rank=8", "model.quantize=int8"], preset="qlora")
    assert applied.stages[1].tune == dataclasses.replace(LORA, rank=8, train_image_rows=True)
    assert applied.model.quantize == "int8"


def test_an_invalid_recipe_is_reported_although_a_preset_is_given(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("stages: 3\noutput_dir: x\n")
    with pytest.raises(ConfigError, match=r"r\.yaml with preset qlora: 2 problems\n"):
        load_recipe(path, preset="qlora")


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--preset", "qlroa"]) == 2
    assert "did you mean 'qlora'?" in capsys.readouterr().err
    assert cli.main(["train", "--preset", "qlora", "model.checkpoint=/nowhere"]) == 2
    error = capsys.readouterr().err
    assert "2 problems\n" in error
    assert "stages.0.data.records: missing" in error
    assert cli.main(["recipe", "show", "dora"]) == 0
    assert capsys.readouterr().out == read_recipe("dora")
    assert cli.main(["recipe", "show", "tiny", "--preset", "dora"]) == 0
    assert "variant: dora" in capsys.readouterr().out


@pytest.mark.slow
def test_training_with_a_preset_with_and_without_a_recipe(tmp_path: Path) -> None:
    from llavar_peft.datagen.synth.synth_settings import SynthSettings
    from llavar_peft.datagen.synth.write_synthetic import write_synthetic

    write_synthetic(tmp_path / "data", 6, SynthSettings(style="plain", seed=1, task="question"))
    parts = ROOT / "llavar_peft/assets/tiny"
    settings = [
        f"model.language_model={parts / 'language_model'}",
        f"model.vision_tower={parts / 'vision_tower'}",
        "model.dtype=float32",
        f"stages.0.data.records={tmp_path / 'data/records.json'}",
        f"stages.0.data.images={tmp_path / 'data/images'}",
        "stages.0.data.workers=0",
        "stages.0.max_steps=1",
        "stages.0.global_batch_size=2",
        "stages.0.micro_batch_size=2",
    ]
    alone = tmp_path / "alone"
    assert cli.main(["train", "--preset", "lora", *settings, f"output_dir={alone}"]) == 0
    assert (alone / "adapter/adapter_model.safetensors").is_file()
    over = tmp_path / "over"
    recipe = str(alone / "recipe.yaml")
    assert cli.main(["train", recipe, f"output_dir={over}", "--preset", "lora-attention-only"]) == 0
    assert load_recipe(over / "adapter/recipe.yaml").stages[0].tune == TUNES["lora-attention-only"]
