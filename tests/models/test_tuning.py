"""What a tune value makes of a model's parameters."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from llavar_peft.models.tuning import EmbeddingWithTrainedRows, lora_config, merge_rows_in_state_dict
from llavar_peft.recipe.schema import Lora, LoraVariant


@pytest.mark.parametrize("variant", get_args(LoraVariant))
def test_every_variant_has_a_peft_configuration(variant: LoraVariant) -> None:
    config = lora_config(Lora(variant=variant))
    assert (config.use_rslora, config.use_dora) == (variant == "rslora", variant == "dora")
    assert config.init_lora_weights is True


def test_trained_rows_are_merged_the_same_way_in_module_and_state_dict() -> None:
    model = nn.Module()
    model.embed_tokens = EmbeddingWithTrainedRows(nn.Embedding(5, 3))
    before = model.embed_tokens.weight.detach().clone()
    with torch.no_grad():
        model.embed_tokens.rows += 1.0
    assert torch.equal(model.embed_tokens.weight, before)
    ids = torch.tensor([[0, 2, 3, 4]])
    expected = model.embed_tokens(ids)
    state = merge_rows_in_state_dict(model.state_dict())
    assert list(state) == ["embed_tokens.weight"]
    merged = model.embed_tokens.merged()
    assert torch.equal(merged.weight, state["embed_tokens.weight"])
    assert torch.equal(merged.weight[:3], before[:3])
    assert torch.equal(merged(ids), expected)
