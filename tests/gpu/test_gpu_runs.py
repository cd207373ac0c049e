"""Whole runs on a GPU: QLoRA learns, an interrupted run resumes bit for bit, a page is read in 4 bits."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit

from llavar_peft import Lora, Recipe, build_model, load_chat
from llavar_peft.errors import InterruptedRunError
from llavar_peft.inference.batch_decoder import answer_all
from llavar_peft.inference.token_sampling import Sampling
from tests.gpu.device import DEVICE, ON_GPU, REHEARSED, deterministic
from tests.training.test_resume import SignalAt, _figures, _train, _weights

pytestmark = ON_GPU


def _recipe(tiny_recipe: Recipe, name: str, *, quantize: Any, steps: int, rate: float = 2e-3) -> Recipe:
    stage = dataclasses.replace(
        tiny_recipe.stages[1],
        tune=Lora(rank=8, alpha=16.0, dropout=0.05),
        optim=dataclasses.replace(tiny_recipe.stages[1].optim, learning_rate=rate, schedule="constant"),
        precision="auto",
        max_steps=steps,
    )
    model = dataclasses.replace(tiny_recipe.model, dtype="auto", quantize=quantize)
    return dataclasses.replace(tiny_recipe, model=model, stages=(stage,), output_dir=f"{tiny_recipe.output_dir}-{name}")


def test_qlora_learns(tiny_recipe: Recipe) -> None:
    steps = 2 if REHEARSED else 12
    recipe = _recipe(tiny_recipe, "qlora", quantize="nf4", steps=steps)
    _train(recipe)
    losses = [loss for _, loss, _ in _figures(recipe, "stage2")]
    assert len(losses) == steps
    assert all(torch.tensor(losses).isfinite())
    if REHEARSED:
        return
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    lines = (Path(recipe.output_dir) / "stage2/metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["peak_memory_mb"] > 0 for line in lines)


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_recipe: Recipe) -> None:
    steps = 2 if REHEARSED else 4
    whole, broken = (_recipe(tiny_recipe, name, quantize=None, steps=steps) for name in ("whole", "broken"))
    with deterministic():
        expected = _train(whole)
        with pytest.raises(InterruptedRunError):
            _train(broken, (SignalAt(steps - 2, signal.SIGTERM),))
        resumed = _train(broken)
    assert _figures(broken, "stage2") == _figures(whole, "stage2")
    weights = _weights(resumed)
    for name, tensor in _weights(expected).items():
        assert torch.equal(tensor, weights[name]), name


def test_one_page_is_read_in_4_bits(tiny_recipe: Recipe, tiny_data: Path, tmp_path: Path) -> None:
    model, processor = build_model(tiny_recipe.model, seed=5)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    page = min((tiny_data / "images").iterdir())
    chat = load_chat(tmp_path / "model", quantize="nf4", device=str(DEVICE))
    layer = chat.engine.base_model.get_decoder().layers[0].mlp.gate_proj
    assert isinstance(layer, Linear4bit)
    assert layer.weight.device.type == DEVICE.type
    request = chat.request(page, "What does the sign say?", sampling=Sampling(temperature=0.0, max_new_tokens=16))
    first, second = (answer_all(chat.engine, [request])[0] for _ in range(2))
    assert first.ids == second.ids
    assert 1 <= len(first.ids) <= 16
    # Four bits change the logits of the prompt, but not beyond recognition.
    ids, pixels = request.ids[None], torch.stack([image.pixels for image in request.images])
    with torch.no_grad():
        whole = model(input_ids=ids, pixel_values=pixels).logits[0, -1]
        reduced = chat.engine.base_model(input_ids=ids.to(DEVICE), pixel_values=pixels.to(DEVICE)).logits[0, -1]
    similarity = torch.nn.functional.cosine_similarity(whole, reduced.float().cpu(), dim=0)
    assert float(similarity) > 0.9
