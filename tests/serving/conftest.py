"""Fixtures: the tiny model with two adapters, images, and a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fastapi import FastAPI

from llavar_peft import Chat, ModelConfig, build_model, load_chat
from llavar_peft.datagen.synth.synth_settings import SynthSettings
from llavar_peft.datagen.synth.write_synthetic import write_synthetic
from llavar_peft.inference.engine import Engine
from llavar_peft.recipe.schema import Lora
from tests.serving.server import Neighbour, serving
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER, save_moved_adapter


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    config = ModelConfig(language_model=str(LANGUAGE_MODEL), vision_tower=str(VISION_TOWER), dtype="float32")
    engine = Engine(*build_model(config, seed=5))
    engine.base_model.save_pretrained(folder)
    engine.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Chat:
    folder = tmp_path_factory.mktemp("adapters")
    base = ModelConfig(checkpoint=str(checkpoint), dtype="float32")
    for seed, name in enumerate(("one", "two")):
        save_moved_adapter(folder / name, base, Lora(rank=2, alpha=8, dropout=0.0), seed=seed, by=0.1)
    return load_chat(checkpoint, {name: folder / name for name in ("one", "two")}, device="cpu")


@pytest.fixture
def endless(chat: Chat) -> Iterator[None]:
    """Make the model generate letters without end, so that answers stop at their limit."""
    head = chat.engine.base_model.lm_head.weight
    before = head.detach().clone()
    direction = torch.randn(head.shape[1], generator=torch.Generator().manual_seed(0)) * 1e3
    letters = chat.engine.processor.tokenizer.convert_tokens_to_ids(["A", "B"])
    with torch.no_grad():
        head.zero_()
        head[letters] = torch.stack([direction, -direction])
        yield
        head.copy_(before)


@pytest.fixture
def slow(chat: Chat) -> Iterator[None]:
    """Slow the model down to a tenth of a second per token."""
    hook = chat.engine.base_model.lm_head.register_forward_hook(lambda *_: time.sleep(0.1))
    yield
    hook.remove()


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that moves the clock of servers and their event loops forward by seconds.

    Limits can then be so long that no pause of the machine reaches them.
    """
    passed, real = 0.0, time.monotonic

    def move(seconds: float) -> None:
        nonlocal passed
        passed += seconds

    monkeypatch.setattr(time, "monotonic", lambda: real() + passed)
    return move


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
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
    """Return the URL of a server with the page."""
    return page_server[0]
