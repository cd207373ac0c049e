"""Train, merge, make a delta to LLaMA and apply it: the result answers as the trained model does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llavar_peft import Lora, OptimConfig, Recipe, Trainer, apply_delta, build_model, make_delta, merge_adapter
from llavar_peft.data.image_preparation import prepare_image
from llavar_peft.inference.chat import load_chat
from llavar_peft.recipe.schema import LoraVariant, Quantization
from llavar_peft.weights.io.tensor_blocks import open_weights

_WAYS: tuple[tuple[LoraVariant, Quantization | None], ...] = (
    ("lora", None), ("rslora", None), ("dora", None), ("pissa", None),
    ("lora", "nf4"), ("rslora", "nf4"), ("dora", "nf4"), ("lora", "int8"), ("dora", "int8"),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "quantize"), _WAYS)
def test_from_training_to_the_applied_delta(
    variant: LoraVariant, quantize: Quantization | None, tiny_recipe: Recipe, tiny_data: Path, tmp_path: Path
) -> None:
    # In fp16 steps of the released format, what training moved has to be seen.
    optim = OptimConfig(learning_rate=1e-2, projector_learning_rate=1e-3)
    tune = Lora(rank=4, alpha=8.0, dropout=0.0, variant=variant)
    stage = dataclasses.replace(tiny_recipe.stages[1], tune=tune, optim=optim, max_steps=3)
    model = dataclasses.replace(tiny_recipe.model, quantize=quantize)
    recipe = dataclasses.replace(tiny_recipe, model=model, stages=(stage,))
    built, processor = build_model(recipe.model, seed=recipe.seed)
    image = sorted((tiny_data / "images").iterdir())[0]
    inputs = {
        "input_ids": processor.encode_question("What does the sign say?"),
        "pixel_values": prepare_image(image, "pad", processor)[None],
    }
    before = _logits(built, inputs)
    trainer = Trainer(built, processor, recipe)
    adapter = trainer.train()
    trained = _logits(trainer.model, inputs)

    llama, tower = recipe.model.language_model, recipe.model.vision_tower
    assert llama is not None
    merge_adapter(llama, adapter, tmp_path / "merged", vision_tower=tower, dtype="float16")
    assert json.loads((tmp_path / "merged/merge.json").read_text())["logits_gap"]["result"]["relative"] < 5e-3
    make_delta(llama, tmp_path / "merged", tmp_path / "delta")
    apply_delta(llama, tmp_path / "delta", tmp_path / "applied")
    applied = load_chat(tmp_path / "applied", vision_tower=tower, dtype="float32").engine.model
    moved = float((trained - before).abs().max())
    # int8's matmul rounds the activations too, which no merged model does.
    allowed = 0.1 if quantize == "int8" else 0.02
    assert float((_logits(applied, inputs) - trained).abs().max()) < allowed * moved

    # Without the merged model on disk, the result has the same bytes.
    make_delta(llama, llama, tmp_path / "at once", adapter=adapter)
    one, other = open_weights(tmp_path / "delta"), open_weights(tmp_path / "at once")
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def _logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**inputs).logits.float()
    return logits
