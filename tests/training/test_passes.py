"""Losses and weights do not depend on the number of passes, nor on the number of layers that recompute."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llavar_peft import Full, Lora, ModelConfig, Recipe, Trainer, build_model
from llavar_peft.data.training_dataset import Collator
from llavar_peft.models.packed_attention import enable_packing
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.recipe.schema import Stage
from llavar_peft.training.activation_checkpointing import Recomputation
from llavar_peft.training.supervised_loss import supervised_loss
from tests.training.test_packing import _items, relative_difference


def _run(recipe: Recipe, stage: Stage, name: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    recipe = dataclasses.replace(recipe, stages=(stage,), output_dir=f"{recipe.output_dir}-{name}")
    model, processor = build_model(recipe.model, seed=recipe.seed)
    folder = Trainer(model, processor, recipe).train()
    lines = (Path(recipe.output_dir) / stage.name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], load_file(next(folder.glob("*model.safetensors")))


@pytest.mark.slow
@pytest.mark.parametrize("average", ["token", "micro_batch"])
def test_a_token_budget_changes_no_loss_and_no_weight(average: Any, tiny_recipe: Recipe) -> None:
    stage = dataclasses.replace(
        tiny_recipe.stages[1], loss_average=average, max_steps=4, global_batch_size=8, micro_batch_size=4
    )
    whole, expected = _run(tiny_recipe, stage, "whole")
    longest = max(line["tokens"] for line in whole) // 8 * 3 // 2
    # A micro batch of four does not fit into one and a half records' tokens: it takes two passes at least.
    divided, weights = _run(tiny_recipe, dataclasses.replace(stage, max_length=longest, max_tokens=longest), "divided")
    assert [line["loss"] for line in divided] == pytest.approx([line["loss"] for line in whole], abs=1e-5)
    assert [line["tokens"] for line in divided] == [line["tokens"] for line in whole]
    for name, one in expected.items():
        torch.testing.assert_close(weights[name], one, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_in_bf16_a_token_budget_changes_results_by_rounding_alone(tiny_recipe: Recipe) -> None:
    """Passes of other records round other sums to bf16. Measured: losses 0.2 %, the way of the weights 1.6 %."""
    half = dataclasses.replace(tiny_recipe, model=dataclasses.replace(tiny_recipe.model, dtype="bfloat16"))
    stage = dataclasses.replace(
        half.stages[1], loss_average="token", max_steps=4, global_batch_size=8, micro_batch_size=4, precision="bf16"
    )
    whole, expected = _run(half, stage, "whole")
    longest = max(line["tokens"] for line in whole) // 8 * 3 // 2
    divided, weights = _run(half, dataclasses.replace(stage, max_length=longest, max_tokens=longest), "divided")
    assert [line["loss"] for line in divided] == pytest.approx([line["loss"] for line in whole], rel=5e-3)
    start = build_model(half.model, seed=half.seed)[0].state_dict()
    ways = [{name: one.float() - start[name].float() for name, one in each.items()} for each in (weights, expected)]
    assert relative_difference(*ways) <= 0.04


@pytest.mark.slow
@pytest.mark.filterwarnings("error:.gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_auto_recomputation_does_not_change_the_result(
    precision: Any, short_model: ModelConfig, tiny_recipe: Recipe
) -> None:
    model = dataclasses.replace(short_model, dtype="bfloat16" if precision == "bf16" else "float32")
    recipe = dataclasses.replace(tiny_recipe, model=model)
    tune = Lora(rank=4, alpha=8.0, dropout=0.1)
    stage = dataclasses.replace(
        recipe.stages[1], tune=tune, max_steps=3, gradient_checkpointing="auto", precision=precision
    )
    auto, expected = _run(recipe, stage, "auto")
    for other in (True, False):
        lines, weights = _run(recipe, dataclasses.replace(stage, gradient_checkpointing=other), str(other))
        assert [line["loss"] for line in lines] == [line["loss"] for line in auto]
        assert all(torch.equal(weights[name], one) for name, one in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("tune", [Full(), Lora(rank=4, alpha=8.0)], ids=["full", "lora"])
def test_the_number_of_layers_follows_tokens_and_memory(tune: Any, tiny_recipe: Recipe) -> None:
    model, processor = build_model(tiny_recipe.model)
    trained = apply_tuning(model, tune).train()
    trained.gradient_checkpointing_enable({"use_reentrant": False})
    assert enable_packing(model)
    batch = Collator(0, packed=True)(_items(processor, images=(True,) * 4))
    tokens = batch["input_ids"].numel()
    memory = [0]
    made = Recomputation(trained, auto=True, device=torch.device("cpu"), free=lambda device: memory[0])
    made.plan(tokens, has_states=False)
    assert made.recomputed == len(made.layers) - 1
    with made.measure(tokens):
        loss, _, _ = supervised_loss(
            trained, {name: one for name, one in batch.items() if name not in ("ids", "faults")}
        )
    loss.backward()
    assert made.cost is not None
    # A LLaMA layer keeps some 10 to 40 vectors of its width for each token.
    width = model.config.text_config.hidden_size
    assert 10 <= made.cost.per_token / width / 4 <= 40
    assert made.cost.input_per_token == width * 4
    found = []
    for memory[0] in (0, 2**22, 2**24, 2**40):
        made.plan(tokens, has_states=True)
        found.append(made.recomputed)
        assert [layer.gradient_checkpointing for layer in made.layers].count(True) == made.recomputed
    assert found[0] == len(made.layers)
    assert found[-1] == 0
    assert found == sorted(found, reverse=True)
    made.plan(tokens, has_states=False)
    assert made.recomputed == len(made.layers)


def test_layers_recompute_where_zero_3_needs_the_memory_for_whole_weights(tiny_recipe: Recipe) -> None:
    model, processor = build_model(tiny_recipe.model)
    trained = apply_tuning(model, Full()).train()
    trained.gradient_checkpointing_enable({"use_reentrant": False})
    assert enable_packing(model)
    batch = Collator(0, packed=True)(_items(processor, images=(True, False, False, False)))
    inputs = {name: one for name, one in batch.items() if name not in ("ids", "faults")}
    tokens, memory = batch["input_ids"].numel(), [0]

    def make() -> Recomputation:
        made = Recomputation(trained, auto=True, device=torch.device("cpu"), free=lambda _: memory[0])
        made.plan(tokens, has_states=False)
        with made.measure(tokens):
            supervised_loss(trained, inputs)[0].backward()
        return made

    def plan(made: Recomputation) -> int:
        made.plan(tokens, has_states=True)
        return made.recomputed

    plain = make()
    while plan(plain):
        memory[0] += 2**18
    for parameter in trained.parameters():
        parameter.ds_numel = parameter.numel()  # how DeepSpeed names the size of a parameter that it partitions
    partitioned = make()
    assert plan(partitioned) > 0
    # All of this model's weights may be gathered at the same time.
    memory[0] += int(1.3 * 4 * sum(parameter.numel() for parameter in trained.parameters()))
    assert plan(partitioned) == 0


def test_without_auto_all_layers_stay_as_they_are(tiny_recipe: Recipe) -> None:
    model, _ = build_model(tiny_recipe.model)
    trained = apply_tuning(model, Full())
    trained.gradient_checkpointing_enable({"use_reentrant": False})
    made = Recomputation(trained, auto=False, device=torch.device("cpu"))
    made.plan(10, has_states=True)
    assert all(layer.gradient_checkpointing for layer in model.model.language_model.layers)
