"""A small run on the shipped tiny parts: both stages in seconds."""

from __future__ import annotations

import dataclasses
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from transformers import CLIPVisionModel, LlamaForCausalLM

from llavar_peft import DataConfig, Full, ModelConfig, OptimConfig, ProbeConfig, Projector, Recipe, Stage
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.datagen.synth.write_synthetic import write_synthetic


@pytest.fixture(scope="session")
def tiny_model() -> ModelConfig:
    parts = Path(str(files("llavar_peft") / "assets/tiny"))
    return ModelConfig(
        language_model=str(parts / "language_model"), vision_tower=str(parts / "vision_tower"), dtype="float32"
    )


@pytest.fixture(scope="session")
def short_model(tiny_model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """Return the tiny model with fewer layers, for runs whose time depends on the number of operations."""
    folder = tmp_path_factory.mktemp("short")
    language_model = LlamaForCausalLM.from_pretrained(tiny_model.language_model)
    tower = CLIPVisionModel.from_pretrained(tiny_model.vision_tower)
    for config, layers in ((language_model.config, language_model.model.layers), (tower.config, tower.encoder.layers)):
        config.num_hidden_layers = 2
        del layers[2:]
    for source, model in ((tiny_model.language_model, language_model), (tiny_model.vision_tower, tower)):
        part = folder / Path(str(source)).name
        shutil.copytree(str(source), part)
        model.save_pretrained(part)
    return dataclasses.replace(
        tiny_model, language_model=str(folder / "language_model"), vision_tower=str(folder / "vision_tower")
    )


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_synthetic(folder, 18, SynthSettings(style="plain", seed=7, task="question"))
    return folder


@pytest.fixture
def tiny_recipe(short_model: ModelConfig, tiny_data: Path, tmp_path: Path) -> Recipe:
    """16 records of 18, 2 held out; 4 optimizer steps an epoch, each of 2 micro batches."""
    data = DataConfig(records=str(tiny_data / "records.json"), images=str(tiny_data / "images"), holdout=2, workers=0)

    def stage(name: str, tune: Projector | Full, rate: float) -> Stage:
        return Stage(
            name=name,
            data=data,
            tune=tune,
            optim=OptimConfig(learning_rate=rate),
            global_batch_size=4,
            micro_batch_size=2,
            max_length=1024,
            precision="fp32",
            probe=ProbeConfig(images=2, max_new_tokens=4),
        )

    return Recipe(
        model=short_model,
        stages=(stage("stage1", Projector(), 2e-3), stage("stage2", Full(), 1e-3)),
        output_dir=str(tmp_path / "run"),
        seed=3,
    )
