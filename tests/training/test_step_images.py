"""A step calls the frozen tower once for its images, with the results of calls for each micro batch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llavar_peft import Projector, Recipe, Trainer, build_model
from llavar_peft.models.modeling_llavar import LlavarModel
from llavar_peft.recipe.schema import Precision
from llavar_peft.training import stage_trainer, step_images
from llavar_peft.training.step_images import share_tower_calls

STEPS = 2


def _train(recipe: Recipe) -> tuple[int, list[float], dict[str, torch.Tensor]]:
    """Return the number of the tower's calls, the losses, and the trained weights."""
    model, processor = build_model(recipe.model, seed=recipe.seed)
    calls: list[Any] = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    folder = Trainer(model, processor, recipe).train()
    lines = (Path(recipe.output_dir) / "stage1/metrics.jsonl").read_text().splitlines()
    weights = load_file(folder / "model.safetensors")
    trained = {name: one for name, one in weights.items() if "multi_modal_projector" in name}
    return len(calls), [json.loads(line)["loss"] for line in lines], trained


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "micro", "max_tokens"), [("fp32", 1, None), ("bf16", 2, 256)], ids=["", "bf16-in-passes"]
)
def test_a_step_calls_the_tower_once(
    precision: Precision, micro: int, max_tokens: int | None, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = dataclasses.replace(tiny_recipe.stages[0].data, holdout=0)
    stage = dataclasses.replace(
        tiny_recipe.stages[0], data=data, tune=Projector(), precision=precision, max_steps=STEPS, max_length=256,
        micro_batch_size=micro, max_tokens=max_tokens,
    )  # fmt: skip
    recipe = dataclasses.replace(tiny_recipe, stages=(stage,))
    calls, losses, weights = _train(recipe)
    monkeypatch.setattr(stage_trainer, "share_tower_calls", lambda *_: None)
    other = dataclasses.replace(recipe, output_dir=f"{recipe.output_dir}-each")
    more_calls, expected, others = _train(other)
    assert calls == STEPS
    assert more_calls >= STEPS * stage.global_batch_size // micro
    exact = precision == "fp32"
    assert losses == pytest.approx(expected, rel=1e-5 if exact else 5e-3)
    for name, one in others.items():
        torch.testing.assert_close(weights[name], one, atol=1e-5 if exact else 2e-3, rtol=1e-4)


def test_only_images_of_one_size_share_a_call(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = build_model(tiny_recipe.model)
    model.requires_grad_(False)
    monkeypatch.setattr(step_images, "IMAGES", 4)
    sizes: list[int] = []

    def features(self: Any, images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return images[:, :1, 0].flatten(1)[:, None] + torch.arange(len(images))[:, None, None]

    monkeypatch.setattr(LlavarModel, "get_patch_features", features)
    side = model.config.vision_config.image_size
    counts = (2, 1, 2, 1, 1, 3, 4)
    batches: list[dict[str, Any]] = [{"pixel_values": torch.zeros(count, 3, side, side)} for count in counts]
    batches[4]["pixel_values"] = torch.zeros(1, 3, 2 * side, side)  # of another size
    batches[1:1] = [{}, {"pixel_values": [torch.zeros(3, side, side)]}]  # no image; images of several sizes
    share_tower_calls(model, batches)
    assert sizes == [3, 3]
    shared = [batch["pixel_values"] for batch in batches if isinstance(batch.get("pixel_values"), torch.Tensor)]
    assert [one.dim() for one in shared] == [3, 3, 3, 3, 4, 4, 4]
    assert [int(number) for one in shared[:4] for number in one[:, 0, 0]] == [0, 1, 2, 0, 1, 2]
    model.model.vision_tower.requires_grad_(True)
    trained = [{"pixel_values": torch.zeros(1, 3, side, side)} for _ in range(2)]
    share_tower_calls(model, trained)
    assert all(batch["pixel_values"].dim() == 4 for batch in trained)
