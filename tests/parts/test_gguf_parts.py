"""GGUF files of other language models and towers, and the models that llama.cpp cannot compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llavar_peft import CrossAttention, ModelConfig, build_model, cli, export
from llavar_peft.data.image_preparation import prepare_image
from llavar_peft.errors import ConfigError
from llavar_peft.recipe.resolution import Tiles
from llavar_peft.recipe.schema import Lora
from tests.parts.tiled_parts import save_plain_model
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER, save_moved_adapter

pytest.importorskip("gguf")
from tests.weights.gguf_reference import GgufContents, image_features, language_logits

Folder = Callable[[str], str]


@pytest.mark.parametrize(
    ("kind", "tower_kind", "projector"),
    [
        ("llama", "clip_vision_model", "mlp2x_gelu"),  # LLaMA 3's frequencies, tied embeddings
        ("mistral", "siglip", "linear"),
        ("qwen2", "clip_vision_model", "linear"),
        ("qwen3", "siglip_vision_model", "mlp2x_gelu"),
    ],
)
def test_the_files_give_the_models_logits(
    kind: str, tower_kind: str, projector: Any, language_model: Folder, tower: Folder, tmp_path: Path
) -> None:
    parts = ModelConfig(
        language_model=language_model(kind), vision_tower=tower(tower_kind), projector_type=projector, dtype="float16"
    )
    model, processor = build_model(parts)
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    export(tmp_path / "m", tmp_path / "out", to="gguf")
    pixels = prepare_image(Image.effect_noise((56, 56), 90).convert("RGB"), "pad", processor)
    ids = processor.encode_question("What is written on the sign? The total is 12.50?", image=False)
    with torch.no_grad():
        model = model.float().eval()
        expected = model(input_ids=ids).logits[0].numpy()
        projected = model.model.get_image_features(pixels[None]).pooler_output[0].numpy()
    # A window of 16 tokens is the whole context of the file; within it nothing differs.
    context = GgufContents(tmp_path / "out/m-f16.gguf").fields
    length = min(len(ids[0]), next(value for name, value in context.items() if name.endswith("context_length")))
    assert length == (16 if kind in ("mistral", "qwen2") else len(ids[0]))
    got = language_logits(tmp_path / "out/m-f16.gguf", ids[0, :length].tolist())
    assert np.abs(got - expected[:length]).max() < 2e-4 * np.abs(expected).max()
    features = image_features(tmp_path / "out/mmproj-m-f16.gguf", pixels.numpy())
    assert np.abs(features - projected).max() < 2e-3 * np.abs(projected).max()


@pytest.mark.parametrize(
    ("kind", "tower_kind", "words"),
    [
        ("gemma2", "clip_vision_model", "language model is not written as GGUF .got 'gemma2', expected llama, mistral"),
        ("qwen2", "dinov2", "does not have this vision tower .got 'dinov2', expected CLIP or SigLIP"),
    ],
)
def test_parts_that_llama_cpp_does_not_have_are_named(
    kind: str, tower_kind: str, words: str, language_model: Folder, tower: Folder, tmp_path: Path
) -> None:
    model, processor = build_model(
        ModelConfig(language_model=language_model(kind), vision_tower=tower(tower_kind), dtype="float32")
    )
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    with pytest.raises(ConfigError, match=f"{words}.*Fix: use the layout hf-llava"):
        export(tmp_path / "m", tmp_path / "out", to="gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    ("resolution", "words"),
    [
        (Tiles(grid=((1, 2), (2, 1))), "tiles are not written as GGUF"),
        (CrossAttention(grid=2), "no engine that reads gguf has the cross-attention"),
    ],
)
def test_resolutions_that_llama_cpp_does_not_have_are_named(
    resolution: Tiles | CrossAttention, words: str, tmp_path: Path
) -> None:
    saved = save_plain_model(tmp_path / "models", resolution)
    model, processor = build_model(saved.added)
    model.save_pretrained(tmp_path / "m")
    processor.save_pretrained(tmp_path / "m")
    with pytest.raises(ConfigError, match=words):
        export(tmp_path / "m", tmp_path / "out", to="gguf")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_merged_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ModelConfig(language_model=str(LANGUAGE_MODEL), vision_tower=str(VISION_TOWER), dtype="float32")
    save_moved_adapter(tmp_path / "adapter", base, Lora(rank=2, alpha=4.0))
    assert cli.main(["convert", str(tmp_path / "adapter"), str(tmp_path / "out"), "--to", "gguf"]) == 2
    assert "merge it first with `llavar-peft merge`" in capsys.readouterr().err
