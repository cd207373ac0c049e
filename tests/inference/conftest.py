"""A tiny LLaVAR on the shipped parts, images, and requests about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llavar_peft import ModelConfig, build_model
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.datagen.synth.write_synthetic import write_synthetic
from llavar_peft.inference.engine import Engine
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER


def _build(**settings: Any) -> Engine:
    config = ModelConfig(
        language_model=str(LANGUAGE_MODEL), vision_tower=str(VISION_TOWER), dtype="float32", **settings
    )
    return Engine(*build_model(config, seed=5))


@pytest.fixture(scope="session")
def engine() -> Engine:
    return _build()


@pytest.fixture(scope="session")
def nf4_engine() -> Engine:
    return _build(quantize="nf4")


@pytest.fixture(scope="session")
def checkpoint(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    engine.base_model.save_pretrained(folder)
    engine.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    write_synthetic(folder, 6, SynthSettings(style="plain", seed=11, width=224, task="question"))
    return sorted((folder / "images").iterdir())


@pytest.fixture(scope="session")
def page() -> Image.Image:
    return Image.new("RGB", (90, 60), (200, 30, 60))
