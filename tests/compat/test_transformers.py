"""The attributes of transformers that ``compat`` depends on: they exist and do what is assumed of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

from llavar_peft.compat.dependency_internals import attention_implementation, use_rotary_kernel
from tests.models.test_layer_kernels import liger_rotary_pos_emb


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_attention_implementation_can_be_read(name: str) -> None:
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    model = LlamaForCausalLM(LlamaConfig(**size, attn_implementation=name))
    assert attention_implementation(model.config) == name
    model.set_attn_implementation("eager")
    assert attention_implementation(model.config) == attention_implementation(model.model.config) == "eager"


def test_only_a_gpu_rotates_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    calls: list[str] = []

    class OnGpu(Tensor):
        is_cuda = True  # type: ignore[assignment]

    def kernel(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        calls.append("kernel")
        return liger_rotary_pos_emb(*tensors)

    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8)
    angles = torch.randn(1, 5, 4).repeat(1, 1, 2)
    tables = (angles.cos(), angles.sin())
    expected = modeling_llama.apply_rotary_pos_emb(query, key, *tables)
    decoder = type("LlamaDecoder", (torch.nn.Module,), {"__module__": modeling_llama.__name__})()
    use_rotary_kernel(decoder, kernel)
    use_rotary_kernel(decoder, kernel)  # a second model of the process
    for one, other in zip(modeling_llama.apply_rotary_pos_emb(query, key, *tables), expected, strict=True):
        assert torch.equal(one, other)
    assert not calls
    on_gpu = modeling_llama.apply_rotary_pos_emb(query.as_subclass(OnGpu), key, *tables)
    assert calls == ["kernel"]
    for one, other in zip(on_gpu, expected, strict=True):
        torch.testing.assert_close(one.as_subclass(Tensor), other, atol=1e-6, rtol=1e-6)
