"""transformers' conversion of checkpoints: experts that are stored one by one, ignored tensors, and tied heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig

from llavar_peft.compat.dependency_internals import keeps_state
from llavar_peft.compat.weight_conversion import convert_stored

_SIZE = {
    "vocab_size": 11, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_local_experts": 12,
}  # fmt: skip


def test_experts_are_joined_in_their_order(tmp_path: Path) -> None:
    config = MixtralConfig(**_SIZE)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.11.w1.weight" in stored
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    found = convert_stored(empty, {**stored, "extra.weight": torch.zeros(1)})
    assert found.keys() == {*model.state_dict(), "extra.weight"}
    assert all(torch.equal(one, found[name]) for name, one in model.state_dict().items())
    # What has the modules' form is left as it is.
    again = convert_stored(empty, model.state_dict())
    assert all(torch.equal(one, again[name]) for name, one in model.state_dict().items())


def test_tensors_that_a_class_ignores_are_left_out() -> None:
    size = {name: value for name, value in _SIZE.items() if "key_value" not in name and "experts" not in name}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **size))
    stored = {"gpt_neox.layers.0.attention.bias": torch.zeros(1), "embed_out.weight": torch.zeros(11, 8)}
    assert convert_stored(model, stored).keys() == {"lm_head.weight"}


@pytest.mark.parametrize(
    ("kind", "state"),
    [("llama", False), ("gemma2", False), ("mixtral", False), ("mamba", True), ("qwen3_next", True), ("rwkv", True),
     ("deepseek_v32", True), ("minimax", True)],
)  # fmt: skip
def test_language_models_with_a_state_are_recognized(kind: str, state: bool) -> None:
    assert keeps_state(AutoConfig.for_model(kind)) == state
