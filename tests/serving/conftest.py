"""The tiny model with two adapters, and pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI

from llavar_peft import Chat, ModelConfig, build_model, load_chat
from llavar_peft.config import Lora
from llavar_peft.data.synth.settings import SynthSettings
from llavar_peft.data.synth.write import write_synthetic
from llavar_peft.inference.engine import Engine
from tests.serving.server import Neighbour, serving
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER, save_moved_adapter


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    config = ModelConfig(language_model=str(LANGUAGE_MODEL), vision_tower=str(VISION_TOWER), dtype="float32")
    engine = Engine(*build_model(config, seed=5))
    engine.plain.save_pretrained(folder)
    engine.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Chat:
    folder = tmp_path_factory.mktemp("adapters")
    base = ModelConfig(checkpoint=str(checkpoint), dtype="float32")
    for seed, name in enumerate(("one", "two")):
        save_moved_adapter(folder / name, base, Lora(rank=2, alpha=8, dropout=0.0), seed=seed, by=0.1)
    return load_chat(checkpoint, {name: folder / name for name in ("one", "two")}, device="cpu")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    write_synthetic(folder, 3, SynthSettings(style="plain", seed=11, width=224, task="question"))
    return sorted((folder / "images").iterdir())


@pytest.fixture
def neighbour() -> Iterator[Neighbour]:
    one = Neighbour()
    yield one
    one.close()


@pytest.fixture(scope="module")
def page_server(chat: Chat) -> Iterator[tuple[str, FastAPI]]:
    with serving(chat, ui=True) as running:
        yield running


@pytest.fixture(scope="module")
def address(page_server: tuple[str, FastAPI]) -> str:
    """Of a server with a page."""
    return page_server[0]
