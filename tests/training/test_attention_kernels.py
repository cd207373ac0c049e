"""Packed rows on the kernels that a GPU has, flash-attention's and torch's, replaced by the same sums in PyTorch."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from llavar_peft import Full, Lora, Projector, Recipe, Trainer, build_model
from llavar_peft.data.training_dataset import Collator
from llavar_peft.models import packed_attention
from llavar_peft.models.packed_attention import disable_packing, enable_packing, packed_arguments
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.recipe.schema import Tune
from tests.flash_attention import KernelCalls, put_flash_attention, use_attention, varlen_kernels
from tests.training.test_packing import _gradients, _items

SOME = (True, False, True, False)
CPU = torch.device("cpu")
TEXT_ARGUMENTS = {"segments", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
# On the CPU the kernels also get the float32 numbers that are compared with SDPA's.
ALL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> KernelCalls:
    return put_flash_attention(monkeypatch, dtypes=ALL_DTYPES)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> Iterator[KernelCalls]:
    pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(packed_attention, "_has_kernel", lambda device: True)
    monkeypatch.setattr(packed_attention, "_KERNEL_DTYPES", ALL_DTYPES)
    with varlen_kernels() as calls:
        yield calls


def _watch_tower(model: Any) -> list[set[str]]:
    """Return a list that collects the names of the arguments of every call of the tower and its modules."""
    seen: list[set[str]] = []
    for module in model.model.vision_tower.modules():
        module.register_forward_pre_hook(lambda _, __, named: seen.append(set(named)), with_kwargs=True)
    return seen


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    largest = max(float(tensor.abs().max()) for tensor in one.values())
    for name, tensor in one.items():
        assert float((other[name] - tensor).abs().max()) <= 1e-5 * max(1.0, largest), name


@pytest.mark.parametrize("kind", ["flash", "varlen"])
@pytest.mark.parametrize(
    ("tune", "recomputed"),
    [(Projector(), False), (Full(), True), (Lora(rank=4, alpha=8.0, dropout=0.0), False)],
    ids=["projector", "full-recomputed", "lora"],
)
def test_loss_and_gradients_equal_those_of_padded_sdpa(
    kind: str, tune: Tune, recomputed: bool, tiny_recipe: Recipe, request: pytest.FixtureRequest
) -> None:
    built, processor = build_model(tiny_recipe.model)
    model = apply_tuning(built, tune).train()
    if recomputed:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    items, pad = _items(processor, images=SOME), processor.tokenizer.pad_token_id
    loss, gradients = _gradients(model, Collator(pad)(items))
    calls: KernelCalls = request.getfixturevalue(kind)
    if kind == "flash":
        use_attention(built, "flash_attention_2")
    arguments = _watch_tower(built)
    assert enable_packing(built)
    packed_loss, packed = _gradients(model, Collator(pad, packed=True)(items))
    disable_packing(built)
    assert packed_loss == pytest.approx(loss, abs=1e-5)
    _equal(gradients, packed)
    ends = [0]
    for item in items:
        ends.append(ends[-1] + len(item.example.input_ids))
    layers = built.config.text_config.num_hidden_layers
    assert calls.of(causal=True) == [ends] * layers * (1 + recomputed)
    # The tower has whole images: of the text's segments it must not know.
    assert arguments
    assert not TEXT_ARGUMENTS & set().union(*arguments)
    assert all(ends is None for ends in calls.of(causal=False))
    assert bool(calls.of(causal=False)) == (kind == "flash")


def test_features_with_options_of_the_stock_method_do_not_get_the_segments(
    tiny_recipe: Recipe, flash: KernelCalls
) -> None:
    """``forward`` must not pass on what it does not know, also where a caller asks for more of the tower."""
    model, processor = build_model(tiny_recipe.model)
    use_attention(model, "flash_attention_2")
    batch = Collator(processor.tokenizer.pad_token_id, packed=True)(_items(processor, images=SOME))
    arguments = packed_arguments(batch["lengths"], model, CPU)
    watched = _watch_tower(model)
    inputs = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"], "use_cache": False}
    with torch.no_grad():
        logits = model(**inputs, **arguments, output_hidden_states=True).logits
    assert logits.isfinite().all()
    assert not TEXT_ARGUMENTS & set().union(*watched)


def test_padded_rows_with_packing_enabled(tiny_recipe: Recipe, flash: KernelCalls) -> None:
    """The held-out loss and the probe use padded rows of a model whose packing is enabled."""
    model, processor = build_model(tiny_recipe.model)
    batch = Collator(processor.tokenizer.pad_token_id)(_items(processor, images=SOME))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits[real]
        use_attention(model, "flash_attention_2")
        assert enable_packing(model)
        logits = model(**inputs, use_cache=False).logits[real]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["flash", "varlen"])
def test_half_precision_under_autocast(
    kind: str, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Trained weights are float32 and so are then queries and keys: the kernels must get autocast's dtype."""
    model, processor = build_model(dataclasses.replace(tiny_recipe.model, dtype="bfloat16"))
    apply_tuning(model, Full()).train()
    items, pad = _items(processor, images=(False,) * 4), processor.tokenizer.pad_token_id
    batch = Collator(pad, packed=True)(items)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        enable_packing(model)
        expected, _ = _gradients(model, batch)
        disable_packing(model)
        calls: KernelCalls = request.getfixturevalue(kind)
        if kind == "flash":
            put_flash_attention(monkeypatch)  # accepts half precision only
            use_attention(model, "flash_attention_2")
        monkeypatch.setattr(packed_attention, "_KERNEL_DTYPES", (torch.bfloat16,))
        enable_packing(model)
        loss, gradients = _gradients(model, batch)
    assert loss == pytest.approx(expected, rel=0.01)
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert kind == "flash" or calls.of(causal=True)


def test_float32_uses_sdpa_where_the_kernel_exists(
    tiny_recipe: Recipe, varlen: KernelCalls, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packed_attention, "_KERNEL_DTYPES", (torch.float16, torch.bfloat16))
    packed_attention._log_choice.cache_clear()
    model, _ = build_model(tiny_recipe.model)
    enable_packing(model)
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="llavar_peft"):
        for _ in range(2):
            ids = torch.arange(3, 10)[None]
            assert model(input_ids=ids, use_cache=False, **packed_arguments((3, 4), model, CPU)).logits.isfinite().all()
    assert not varlen.shapes
    assert [record.message for record in caplog.records if "packed rows" in record.message] == [
        "packed rows on cpu: attention within each conversation, by varlen_attn in half precision, otherwise by SDPA"
    ]


@pytest.mark.parametrize(
    ("changes", "has_kernel"), [({}, True), ({"attention_dropout": 0.1}, False), ({"head_dim": 20}, False)]
)
def test_the_kernel_is_used_where_it_fits(
    changes: dict[str, Any], has_kernel: bool, tiny_recipe: Recipe, varlen: KernelCalls
) -> None:
    model, _ = build_model(tiny_recipe.model)
    enable_packing(model)
    for name, value in changes.items():
        setattr(model.config.text_config, name, value)
    assert ("cu_seq_lens_q" in packed_arguments((2, 3), model, CPU)) == has_kernel


def test_no_kernel_is_looked_for_without_a_gpu(tiny_recipe: Recipe) -> None:
    model, _ = build_model(tiny_recipe.model)
    enable_packing(model)
    assert set(packed_arguments((2, 3), model, CPU)) == {"position_ids", "segments", "attention_mask"}


def test_fewer_key_heads(varlen: KernelCalls) -> None:
    query, key, value = (torch.randn(1, heads, 9, 8) for heads in (4, 2, 2))
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = True, 2
    arguments: dict[str, Any] = {"segments": packed_attention.Segments((4, 5)), "scaling": 0.3}
    by_segment = packed_attention._sdpa_within_segments(module, query, key, value, None, **arguments)[0]
    arguments.update(cu_seq_lens_q=ends, max_length_q=5)
    at_once = packed_attention._sdpa_within_segments(module, query, key, value, None, **arguments)[0]
    assert len(varlen.shapes) == 1
    torch.testing.assert_close(at_once, by_segment, atol=1e-5, rtol=1e-5)


def test_the_stand_in_reports_what_cuda_would_not(flash: KernelCalls, tiny_recipe: Recipe) -> None:
    model, _ = build_model(tiny_recipe.model)
    use_attention(model, "flash_attention_2")
    arguments = packed_arguments((3, 4), model, CPU)

    def logits(ends: tuple[int, ...]) -> torch.Tensor:
        places = torch.tensor(ends, dtype=torch.int32)
        wrong = {**arguments, "cu_seq_lens_q": places, "cu_seq_lens_k": places, "max_length_q": 5, "max_length_k": 5}
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=torch.arange(3, 10)[None], use_cache=False, **wrong).logits[0]
        return found

    with pytest.raises(RuntimeError, match="reads beyond 7 tokens"):
        logits((0, 3, 8))
    short = logits((0, 3, 6))
    assert short[:6].isfinite().all()
    assert short[6].isnan().all()


@pytest.mark.slow
def test_a_stage_in_float32_does_not_call_flash_attention(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``auto`` chooses flash-attention by the weights' dtype, before the precision of a stage is known."""
    calls = put_flash_attention(monkeypatch)  # accepts half precision only
    stage = dataclasses.replace(tiny_recipe.stages[1], max_steps=1, precision="fp32")
    recipe = dataclasses.replace(tiny_recipe, stages=(stage,))
    model, processor = build_model(recipe.model)
    use_attention(model, "flash_attention_2")
    with caplog.at_level(logging.INFO, logger="llavar_peft"):
        Trainer(model, processor, recipe).train()
    assert not calls.shapes
    assert any("SDPA replaces flash-attention" in record.message for record in caplog.records)
