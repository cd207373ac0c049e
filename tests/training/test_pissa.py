"""Every checkpoint of PiSSA holds an adapter for the unchanged base, and a run resumes from it exactly."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from llavar_peft import Full, Lora, Recipe, Trainer, build_model, load_adapter
from llavar_peft.errors import ConfigError, InterruptedRunError
from llavar_peft.models.tuning import apply_tuning

TUNE = Lora(rank=4, alpha=8, dropout=0.1, variant="pissa")
IDS = torch.tensor([[1, 40, 41, 42, 43, 44, 45]])


class InterruptAt(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    """One stage, from the parts."""
    return dataclasses.replace(tiny_recipe, stages=(dataclasses.replace(tiny_recipe.stages[0], tune=TUNE),))


def _trainer(recipe: Recipe, *callbacks: TrainerCallback) -> Trainer:
    model, processor = build_model(recipe.model, seed=recipe.seed)
    return Trainer(model, processor, recipe, callbacks=callbacks)


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return logits


def test_at_the_start_the_model_is_the_base(recipe: Recipe) -> None:
    plain, _ = build_model(recipe.model)
    whole = plain.model.language_model.layers[0].mlp.up_proj.weight.detach().clone()
    before = _logits(plain)
    wrapped = apply_tuning(plain, TUNE)
    torch.testing.assert_close(_logits(wrapped), before, atol=1e-4, rtol=1e-4)
    left = wrapped.get_base_model().model.language_model.layers[0].mlp.up_proj.base_layer.weight
    largest = float(torch.linalg.svdvals(left)[0])
    assert largest == pytest.approx(float(torch.linalg.svdvals(whole)[TUNE.rank]), rel=0.05)


@pytest.mark.slow
def test_every_checkpoint_and_the_result_fit_the_whole_base(recipe: Recipe) -> None:
    trainer = _trainer(recipe, InterruptAt(2))
    with pytest.raises(InterruptedRunError):
        trainer.train()
    (checkpoint,) = (Path(recipe.output_dir) / recipe.stages[0].name).glob("checkpoint-*")
    base, _ = build_model(recipe.model, seed=recipe.seed)
    untouched = _logits(base)
    opened = _logits(PeftModel.from_pretrained(base, str(checkpoint)))
    torch.testing.assert_close(opened, _logits(trainer.model), atol=1e-5, rtol=1e-5)

    trainer = _trainer(recipe)
    result = trainer.train()
    settings = json.loads((result / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["init_lora_weights"]) == (8, 16.0, True)
    trained = _logits(trainer.model)
    base, _ = build_model(recipe.model, seed=recipe.seed)
    torch.testing.assert_close(_logits(PeftModel.from_pretrained(base, str(result))), trained, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(_logits(load_adapter(recipe.model, result)), trained, atol=1e-5, rtol=1e-5)
    assert (trained - untouched).abs().max() > 1e-2


def _residual(recipe: Recipe, seed: int, start: Path | None = None) -> torch.Tensor:
    torch.manual_seed(seed)
    model, _ = build_model(recipe.model)
    apply_tuning(model, TUNE, new_rows=True, checkpoint=start)
    weight: torch.Tensor = model.model.language_model.layers[0].self_attn.q_proj.base_layer.weight
    return weight


def test_every_process_subtracts_the_same_components(recipe: Recipe) -> None:
    assert torch.equal(_residual(recipe, 1), _residual(recipe, 2))


@pytest.mark.slow
def test_a_resumed_run_uses_the_saved_components_not_new_ones(recipe: Recipe) -> None:
    """The decomposition of another machine differs in the last bits; here by more, to make it visible."""
    with pytest.raises(InterruptedRunError):
        _trainer(recipe, InterruptAt(2)).train()
    (checkpoint,) = (Path(recipe.output_dir) / recipe.stages[0].name).glob("checkpoint-*")
    assert torch.equal(_residual(recipe, 1, checkpoint), _residual(recipe, 1))
    path, name = checkpoint / "adapter_model.safetensors", "base_model.model.model.language_model.layers.0.self_attn"
    tensors = load_file(path)
    tensors[f"{name}.q_proj.lora_B.weight"][:, TUNE.rank :] = 0
    save_file(tensors, path)
    whole = build_model(recipe.model)[0].model.language_model.layers[0].self_attn.q_proj.weight
    assert torch.equal(_residual(recipe, 1, checkpoint), whole)


@pytest.mark.slow
def test_the_next_stage_builds_on_the_merged_adapter_also_in_a_second_run(recipe: Recipe, tmp_path: Path) -> None:
    second = dataclasses.replace(recipe.stages[0], name="after", tune=Full())
    whole = dataclasses.replace(recipe, stages=(*recipe.stages, second), output_dir=str(tmp_path / "whole"))
    expected = load_file(_trainer(whole).train() / "model.safetensors")
    halved = dataclasses.replace(whole, output_dir=str(tmp_path / "halved"))
    first = _trainer(halved).train([recipe.stages[0].name])
    assert first.name == "adapter"
    ours = load_file(_trainer(halved).train() / "model.safetensors")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_rank_larger_than_the_layer_is_rejected(recipe: Recipe) -> None:
    model, _ = build_model(recipe.model)
    with pytest.raises(ConfigError, match=r"pissa cannot take 500 components out of .*Fix: use a rank of \d+ at most"):
        apply_tuning(model, dataclasses.replace(TUNE, rank=500))
