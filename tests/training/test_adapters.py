"""LoRA as stage 2, on a plain and on a 4-bit base: what is saved is what was trained, and it can be asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llavar_peft import Lora, Recipe, Trainer, build_model
from llavar_peft.config import LoraVariant, Quantization
from llavar_peft.inference import load_reader
from llavar_peft.models.tuning import prepare_for, trained_names


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_an_adapter_holds_everything_and_reads_as_in_training(
    quantize: Quantization | None, tiny_recipe: Recipe, tiny_data: Path
) -> None:
    first, second = tiny_recipe.stages
    recipe = dataclasses.replace(
        tiny_recipe,
        model=dataclasses.replace(tiny_recipe.model, quantize=quantize),
        stages=(first, dataclasses.replace(second, tune=Lora(rank=4, alpha=8, dropout=0.0))),
    )
    model, processor = build_model(recipe.model, seed=recipe.seed)
    trainer = Trainer(model, processor, recipe)
    result = trainer.train()
    assert result.name == "adapter"

    trained = trained_names(trainer.model)
    assert not [name for name in trained if "vision_tower" in name]
    stored = load_file(result / "adapter_model.safetensors")
    assert len(stored) == len(trained)
    assert [name for name in stored if "multi_modal_projector" in name]

    reader = load_reader(result)
    ids = processor.encode_question("What does the sign say?")
    picture = sorted((tiny_data / "images").iterdir())[0]
    from llavar_peft.data import prepare_image

    pixels = prepare_image(picture, "pad", processor)[None]
    with torch.inference_mode():
        ours = _logits(trainer.model, ids, pixels)
        theirs = _logits(reader.model, ids, pixels)
    # On a 4-bit base stage 1's rows and projector are laid over the source before it is quantized again: the same.
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert len(reader.ask([picture], "What does the sign say?", max_new_tokens=4)) == 1


def test_pissa_starts_as_the_base(tiny_recipe: Recipe) -> None:
    model, processor = build_model(tiny_recipe.model)
    ids = processor.encode_question("Read.", image=False)
    before = _logits(model, ids).detach()
    weight = model.model.language_model.layers[0].mlp.up_proj.weight.clone()
    wrapped = prepare_for(model, Lora(rank=4, alpha=8, dropout=0.0, variant="pissa"))
    torch.testing.assert_close(_logits(wrapped, ids), before, atol=1e-4, rtol=1e-4)
    residual = wrapped.get_base_model().model.language_model.layers[0].mlp.up_proj.base_layer.weight
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(residual)[0], values[4], rtol=5e-2, atol=0)


@pytest.mark.parametrize("variant", ["lora", "pissa"])
def test_plain_peft_opens_the_adapter(variant: LoraVariant, tiny_recipe: Recipe) -> None:
    from peft import PeftModel

    first, second = tiny_recipe.stages
    tune = Lora(rank=4, alpha=8, variant=variant)
    recipe = dataclasses.replace(tiny_recipe, stages=(first, dataclasses.replace(second, tune=tune)))
    model, processor = build_model(recipe.model, seed=recipe.seed)
    trainer = Trainer(model, processor, recipe)
    result = trainer.train()
    base, _ = build_model(dataclasses.replace(trainer.base), seed=recipe.seed)
    opened = PeftModel.from_pretrained(base, str(result))
    ids = processor.encode_question("Read.", image=False)
    trainer.model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(_logits(opened, ids), _logits(trainer.model, ids), atol=1e-5, rtol=1e-5)


def _logits(model: Any, ids: torch.Tensor, pixels: torch.Tensor | None = None) -> torch.Tensor:
    model.eval()
    inputs = {"input_ids": ids} | ({"pixel_values": pixels} if pixels is not None else {})
    logits: torch.Tensor = model(**inputs).logits
    return logits
