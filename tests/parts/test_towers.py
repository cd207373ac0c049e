"""Vision towers of many kinds: their features are those of transformers, and unused layers are not computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import AutoModel

from llavar_peft import ModelConfig, build_model
from llavar_peft.models.vision_tower import tower_features, tower_layers
from tests.parts.tiny_parts import TOWERS

Folder = Callable[[str], str]


@pytest.mark.parametrize("layer", [-2, -1, 0])
@pytest.mark.parametrize("kind", TOWERS)
def test_the_features_are_those_of_transformers(kind: str, layer: int, language_model: Folder, tower: Folder) -> None:
    folder = tower(kind)
    parts = ModelConfig(language_model=language_model("qwen2"), vision_tower=folder, vision_feature_layer=layer)
    model, processor = build_model(parts)
    stock = AutoModel.from_pretrained(folder).eval()
    stock = getattr(stock, "vision_model", stock)
    pixels = torch.randn(2, 3, processor.image_side, processor.image_side)
    with torch.no_grad():
        features = model.model.get_image_features(pixels)
        if layer == -1:  # transformers returns the last state of some towers after their final norm
            expected = _before_norm(stock, pixels)
        else:
            expected = stock(pixel_values=pixels, output_hidden_states=True).hidden_states[layer]
    assert torch.equal(features.last_hidden_state, expected)
    patches = (processor.image_side // 14) ** 2
    assert processor.num_image_tokens == model.config.image_seq_length == patches
    projected = torch.stack(features.pooler_output)
    with torch.no_grad():
        assert torch.allclose(projected, model.model.multi_modal_projector(expected[:, -patches:]))


def _before_norm(stock: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    handle = tower_layers(stock)[-1].register_forward_hook(
        lambda *call: kept.append(call[2][0] if isinstance(call[2], tuple) else call[2])
    )
    stock(pixel_values=pixels)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize("kind", TOWERS)
def test_layers_after_the_features_are_not_computed(kind: str, tower: Folder) -> None:
    model = AutoModel.from_pretrained(tower(kind)).eval()
    model = getattr(model, "vision_model", model)
    computed = []
    for number, layer in enumerate(tower_layers(model)):
        layer.register_forward_hook(lambda *_, number=number: computed.append(number))
    with torch.no_grad():
        tower_features(model, torch.randn(1, 3, 56, 56), 2)
        assert computed == [0, 1]
        tower_features(model, torch.randn(1, 3, 56, 56), 3)
    assert computed == [0, 1, 0, 1, 2]
