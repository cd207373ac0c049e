"""Merging onto a plain language model, with every kind of tower read from its own folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llavar_peft import Lora, ModelConfig, build_model, merge_adapter
from llavar_peft.weights.io.tensor_blocks import open_weights
from tests.weights.adapters import save_moved_adapter

Folder = Callable[[str], str]


@pytest.mark.parametrize("kind", ["siglip", "dinov2", "dinov2_with_registers", "dinov3_vit", "aimv2_vision_model"])
def test_the_merged_model_has_the_tower_and_the_logits(
    kind: str, language_model: Folder, tower: Folder, tmp_path: Path
) -> None:
    parts = ModelConfig(language_model=language_model("olmo2"), vision_tower=tower(kind), dtype="float32")
    wrapped = save_moved_adapter(tmp_path / "adapter", parts, Lora(rank=2, alpha=4, dropout=0.0))
    merge_adapter(language_model("olmo2"), tmp_path / "adapter", tmp_path / "merged", dtype="float32", probe=False)
    merged, processor = build_model(ModelConfig(checkpoint=str(tmp_path / "merged"), dtype="float32"))
    known = {name: one for name, one in wrapped.get_base_model().state_dict().items() if "vision_tower" in name}
    stored = open_weights(tmp_path / "merged")
    assert known
    assert all(torch.equal(stored[name], one) for name, one in known.items())
    ids = processor.encode_question("What is written?")
    pixels = torch.randn(1, 3, processor.image_side, processor.image_side)
    with torch.no_grad():
        expected = wrapped(input_ids=ids, pixel_values=pixels).logits
        assert torch.allclose(merged(input_ids=ids, pixel_values=pixels).logits, expected, atol=1e-4)
