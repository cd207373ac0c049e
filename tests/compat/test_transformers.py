"""The attributes of transformers that ``compat`` depends on: they exist and do what is assumed of them."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from llavar_peft.compat.dependency_internals import attention_implementation


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_attention_implementation_can_be_read(name: str) -> None:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    model = LlamaForCausalLM(LlamaConfig(**size, attn_implementation=name))
    assert attention_implementation(model.config) == name
    model.set_attn_implementation("eager")
    assert attention_implementation(model.config) == attention_implementation(model.model.config) == "eager"
