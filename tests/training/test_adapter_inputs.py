"""Under autocast, an adapter keeps no copy of its layer's input for the backward pass, with the same gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from llavar_peft import Lora, Recipe, build_model
from llavar_peft.data.training_dataset import Collator
from llavar_peft.models.packed_attention import enable_packing
from llavar_peft.models.tuning import apply_tuning, share_adapter_inputs
from llavar_peft.training.activation_checkpointing import Recomputation
from llavar_peft.training.supervised_loss import supervised_loss
from tests.training.test_packing import _items

_BYTES = 2  # of a number in bfloat16


def _train(trained: Any, batch: dict[str, Any], *, share: bool) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Return the bytes that a layer keeps for each token, the loss, and the gradients of a pass under autocast."""
    trained.zero_grad()
    tokens = batch["input_ids"].numel()
    made = Recomputation(trained, auto=True, device=torch.device("cpu"))
    made.plan(tokens, has_states=False)
    with share_adapter_inputs(trained, autocast=share), torch.autocast("cpu", dtype=torch.bfloat16):
        with made.measure(tokens):
            loss, _, _ = supervised_loss(trained, batch)
        loss.backward()
    assert made.cost is not None
    gradients = {name: one.grad.clone() for name, one in trained.named_parameters() if one.grad is not None}
    return made.cost.per_token, float(loss.detach()), gradients


@pytest.mark.slow
def test_no_copy_of_an_input_is_kept(tiny_recipe: Recipe) -> None:
    model, processor = build_model(dataclasses.replace(tiny_recipe.model, dtype="bfloat16"))
    trained = apply_tuning(model, Lora(rank=4, alpha=8.0, dropout=0.0)).train()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02  # zero would hide gradients
    trained.gradient_checkpointing_enable({"use_reentrant": False})
    assert enable_packing(model)
    batch = Collator(0, packed=True)(_items(processor, images=(True, False, False, False)))
    inputs = {name: one for name, one in batch.items() if name not in ("ids", "faults")}
    kept, loss, gradients = _train(trained, inputs, share=False)
    shared, same_loss, same_gradients = _train(trained, inputs, share=True)
    config = model.config.text_config
    # Query, key and value read the same vector, and so do gate and up: three copies of it less.
    assert kept - shared == pytest.approx(3 * config.hidden_size * _BYTES, rel=0.01)
    assert same_loss == loss
    assert gradients.keys() == same_gradients.keys()
    assert all(torch.equal(same_gradients[name], one) for name, one in gradients.items())


def test_without_autocast_and_for_dora_the_conversion_stays(tiny_recipe: Recipe) -> None:
    for variant, autocast in (("lora", False), ("dora", True)):
        model, _ = build_model(tiny_recipe.model)
        trained = apply_tuning(model, Lora(rank=4, alpha=8.0, variant=variant))  # type: ignore[arg-type]
        layer = trained.get_base_model().model.language_model.layers[0].self_attn.q_proj
        with share_adapter_inputs(trained, autocast=autocast):
            assert layer.cast_input_dtype_enabled
