"""Packed rows give the losses, gradients and weights of padded ones, without attention between conversations."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llavar_peft import Full, Lora, Projector, Recipe, Trainer, build_model
from llavar_peft.compat.dependency_internals import attention_implementation
from llavar_peft.data.encode_record import encode_record
from llavar_peft.data.training_dataset import Collator, Item
from llavar_peft.models.packed_attention import disable_packing, enable_packing, packed_arguments
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.recipe.schema import Tune
from llavar_peft.training.supervised_loss import supervised_loss

TUNES: tuple[Tune, ...] = (Projector(), Full(), Lora(rank=4, alpha=8.0, dropout=0.0))
BF16 = (5e-4, 0.01)
"""Largest relative difference of the loss and of the gradients in bf16, about twice of what was measured."""
TEXTS = ("Read.", "What does the sign say, and in which colour?", "Say nothing.", "Is there a second line of text?")


def _items(processor: LlavarProcessor, *, images: tuple[bool, ...]) -> list[Item]:
    generator = torch.Generator().manual_seed(0)
    size = processor.image_processor.crop_size["height"]
    items = []
    for number, (text, has) in enumerate(zip(TEXTS, images, strict=True)):
        turns = [
            {"from": "human", "value": f"{text}\n<image>" if has else text},
            {"from": "gpt", "value": text.upper()},
        ]
        record: dict[str, Any] = {"id": str(number), "conversations": turns, **({"image": "a.png"} if has else {})}
        pixels = (torch.randn(3, size, size, generator=generator),) if has else ()
        items.append(Item(encode_record(record, processor, 512), pixels, None))
    return items


def _loss(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name not in ("ids", "faults")}
    loss, count, _ = supervised_loss(model, inputs)
    return loss / count


def _gradients(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = _loss(model, batch)
    loss.backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return float(loss.detach()), found


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("images", [(True,) * 4, (True, False, True, False), (False,) * 4], ids=["all", "some", "none"])
@pytest.mark.parametrize("tune", TUNES, ids=lambda tune: type(tune).__name__)
def test_loss_and_gradients_equal_those_of_padded_rows(
    tune: Tune, images: tuple[bool, ...], checkpointing: bool, tiny_recipe: Recipe
) -> None:
    built, processor = build_model(tiny_recipe.model)
    model = apply_tuning(built, tune)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    items, pad = _items(processor, images=images), processor.tokenizer.pad_token_id
    loss, gradients = _gradients(model, Collator(pad)(items))
    assert enable_packing(built)
    packed_loss, packed = _gradients(model, Collator(pad, packed=True)(items))
    disable_packing(built)
    assert packed_loss == pytest.approx(loss, abs=1e-5)
    assert set(packed) == set(gradients)
    largest = max(float(one.abs().max()) for one in gradients.values())
    for name, one in gradients.items():
        assert float((packed[name] - one).abs().max()) <= 1e-5 * max(1.0, largest), name


@pytest.mark.slow
@pytest.mark.parametrize("tune", TUNES, ids=lambda tune: type(tune).__name__)
def test_in_bf16_packed_rows_differ_by_rounding_alone(tune: Tune, tiny_recipe: Recipe) -> None:
    """Padded and packed rows add the same products in another order; bf16 has 8 bits."""
    built, processor = build_model(dataclasses.replace(tiny_recipe.model, dtype="bfloat16"))
    model = apply_tuning(built, tune).train()
    items, pad = _items(processor, images=(True, False, True, False)), processor.tokenizer.pad_token_id
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        loss, gradients = _gradients(model, Collator(pad)(items))
        assert enable_packing(built)
        packed_loss, packed = _gradients(model, Collator(pad, packed=True)(items))
    disable_packing(built)
    assert packed_loss == pytest.approx(loss, rel=BF16[0])
    assert relative_difference(packed, gradients) <= BF16[1]


def relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the norm of the difference of all tensors together, relative to the norm of the expected ones."""
    assert set(found) == set(expected)
    both = [(found[name].double(), one.double()) for name, one in expected.items()]
    squares = [(float((ours - theirs).square().sum()), float(theirs.square().sum())) for ours, theirs in both]
    return float((sum(one for one, _ in squares) / sum(other for _, other in squares)) ** 0.5)


def test_conversations_do_not_attend_to_each_other(tiny_recipe: Recipe) -> None:
    model, processor = build_model(tiny_recipe.model)
    items = _items(processor, images=(False,) * 4)
    rows = [item.example.input_ids for item in items]
    lengths = tuple(map(len, rows))
    alone = [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    enable_packing(model)
    arguments = packed_arguments(lengths, model, torch.device("cpu"))
    together = model(input_ids=torch.cat(rows)[None], use_cache=False, **arguments).logits[0].split(lengths)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)
    # Padded rows and generation still work with packing enabled.
    again = model(input_ids=rows[0][None], use_cache=False).logits[0]
    disable_packing(model)
    torch.testing.assert_close(again, alone[0], atol=1e-4, rtol=1e-5)
    assert attention_implementation(model.config.text_config) == "sdpa"


def test_eager_attention_pads(tiny_recipe: Recipe) -> None:
    model, _ = build_model(dataclasses.replace(tiny_recipe.model, attention="eager"))
    assert not enable_packing(model)


@pytest.mark.slow
def test_a_run_ends_with_the_same_weights(tiny_recipe: Recipe) -> None:
    """Both stages, packed and padded; the saved configuration is the same."""
    ended, figures = [], []
    for packing in (True, False):
        stages = tuple(dataclasses.replace(stage, packing=packing, max_steps=4) for stage in tiny_recipe.stages)
        recipe = dataclasses.replace(tiny_recipe, stages=stages, output_dir=f"{tiny_recipe.output_dir}-{packing}")
        model, processor = build_model(recipe.model, seed=recipe.seed)
        folder = Trainer(model, processor, recipe).train()
        ended.append(load_file(folder / "model.safetensors"))
        lines = [line for stage in stages for line in (Path(recipe.output_dir) / stage.name / "metrics.jsonl").open()]
        figures.append([json.loads(line) for line in lines])
        assert "within" not in (folder / "config.json").read_text()
    packed, padded = figures
    assert len(packed) == 8
    assert [line["loss"] for line in packed] == pytest.approx([line["loss"] for line in padded], abs=1e-5)
    for name in ("tokens", "supervised_tokens"):
        assert [line[name] for line in packed] == [line[name] for line in padded]
    for name, one in ended[0].items():
        torch.testing.assert_close(one, ended[1][name], atol=1e-5, rtol=1e-4)
