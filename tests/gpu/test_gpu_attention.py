"""Packed rows on a GPU: each kernel gives SDPA's results, and the right one is chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llavar_peft import Lora, Recipe, build_model
from llavar_peft.data.training_dataset import Collator
from llavar_peft.models import packed_attention
from llavar_peft.models.packed_attention import Segments, disable_packing, enable_packing
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.recipe.schema import Attention
from llavar_peft.training.supervised_loss import supervised_loss
from tests.gpu.device import DEVICE, ON_GPU
from tests.training.test_packing import _items

pytestmark = ON_GPU
LENGTHS = (300, 1, 77, 646)


def _needs_kernel() -> None:
    if not packed_attention._has_kernel(DEVICE):
        pytest.skip("varlen_attn needs compute capability 8.0 and torch 2.11")


def _attend(tensors: tuple[Tensor, ...], gradient: Tensor, **arguments: Any) -> list[Tensor]:
    inputs = [tensor.detach().requires_grad_() for tensor in tensors]
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, inputs[0].shape[1] // inputs[1].shape[1]
    output = packed_attention._sdpa_within_segments(module, *inputs, None, segments=Segments(LENGTHS), **arguments)[0]
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient.to(output.dtype))]


@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize("width", [32, 128])
def test_varlen_attention_is_sdpa(width: int, key_heads: int) -> None:
    """The error against float32 is at most twice that of SDPA in bfloat16."""
    _needs_kernel()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    tokens = sum(LENGTHS)
    exact = (draw(1, 8, tokens, width), *(draw(1, key_heads, tokens, width) for _ in range(2)))
    exact = tuple(tensor.bfloat16().float() for tensor in exact)
    half = tuple(tensor.bfloat16() for tensor in exact)
    gradient = draw(1, tokens, 8, width).bfloat16().float()
    host = packed_attention._kernel_arguments(LENGTHS, DEVICE)
    chosen = {"cu_seq_lens_q": host["cu_seq_lens_q"], "max_length_q": host["max_length_q"]}
    expected = _attend(exact, gradient)
    by_sdpa, by_varlen = _attend(half, gradient), _attend(half, gradient, **chosen)
    for reference, one, other in zip(expected, by_sdpa, by_varlen, strict=True):
        assert other.isfinite().all()
        allowed = 2 * float((one.float() - reference).abs().max()) + 1e-2
        assert float((other.float() - reference).abs().max()) <= allowed


def _loss(recipe: Recipe, attention: Attention, *, packed: bool) -> tuple[float, dict[str, Tensor]]:
    model, processor = build_model(
        dataclasses.replace(recipe.model, dtype="bfloat16", attention=attention), device=DEVICE, seed=1
    )
    torch.manual_seed(0)
    trained = apply_tuning(model, Lora(rank=4, dropout=0.0)).train()
    assert not packed or enable_packing(model)
    items = _items(processor, images=(True, False, True, True))
    batch = Collator(processor.tokenizer.pad_token_id, packed=packed)(items)
    inputs = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in batch.items()}
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        loss, count, _ = supervised_loss(trained, inputs)
    (loss / count).backward()
    disable_packing(model)
    return float(loss.detach()) / count, {name: p.grad for name, p in trained.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_packed_training_gives_the_padded_loss(attention: Attention, tiny_recipe: Recipe) -> None:
    if attention == "sdpa":
        _needs_kernel()
    else:
        pytest.importorskip("flash_attn")
    expected, gradients = _loss(tiny_recipe, "sdpa", packed=False)
    loss, others = _loss(tiny_recipe, attention, packed=True)
    assert loss == pytest.approx(expected, rel=0.02)
    assert set(others) == set(gradients)
    norm, other_norm = (
        float(torch.stack([g.float().norm() for g in one.values()]).norm()) for one in (gradients, others)
    )
    assert other_norm == pytest.approx(norm, rel=0.1)
