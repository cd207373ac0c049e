"""The attributes of bitsandbytes that ``compat`` depends on: they exist and do what is assumed of them."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

bnb = pytest.importorskip("bitsandbytes")

from llavar_peft.compat.dependency_internals import keep_quantization_scales  # noqa: E402


def _int8_layer() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(32, 16, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(torch.randn(16, 32), requires_grad=False, has_fp16_weights=False).to("cpu")
    return nn.Sequential(layer).eval(), torch.randn(4, 32)


def _move_weight(model: nn.Module) -> None:
    """Move the weight to where it is, as peft's DoRA does in each forward pass."""
    model[0].weight = model[0].weight.to("cpu")


def test_int8_scales_are_in_the_assumed_attributes() -> None:
    model, inputs = _int8_layer()
    assert model[0].weight.SCB is not None
    model(inputs)
    assert model[0].weight.CB is None
    assert model[0].weight.SCB is None
    assert model[0].state.SCB is not None
    _move_weight(model)
    assert model[0].weight.CB is not None


def test_a_moved_int8_weight_loses_its_scales_without_the_workaround() -> None:
    """When this fails, bitsandbytes or peft has fixed the fault, and the workaround can be removed."""
    model, inputs = _int8_layer()
    model(inputs)
    _move_weight(model)
    with pytest.raises(AttributeError):
        model(inputs)


def test_a_moved_int8_weight_keeps_its_scales() -> None:
    model, inputs = _int8_layer()
    keep_quantization_scales(model)
    expected = model(inputs)
    for _ in range(2):
        _move_weight(model)
        assert torch.equal(model(inputs), expected)


def _nf4_layer() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    return nn.Sequential(layer.to("cpu")).eval(), torch.randn(4, 64)


def test_4_bit_layers_are_repacked_only_where_the_attribute_says_so() -> None:
    model, inputs = _nf4_layer()
    assert "self.support_avx512bf16_for_cpu" in inspect.getsource(bnb.nn.Linear4bit.forward)
    before = model[0].weight.data.clone()
    repacks = bool(model[0].support_avx512bf16_for_cpu)
    model(inputs)
    assert torch.equal(model[0].weight.data, before) is not repacks


def test_4_bit_weights_stay_unchanged() -> None:
    model, inputs = _nf4_layer()
    keep_quantization_scales(model)
    before = model[0].weight.data.clone()
    model(inputs)
    assert torch.equal(model[0].weight.data, before)
