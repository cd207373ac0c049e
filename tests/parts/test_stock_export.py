"""Exports to stock LLaVA: with any language model and tower, transformers gives our logits and answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from llavar_peft import ModelConfig, build_model, export
from llavar_peft.errors import ConfigError
from tests.parts.tiny_parts import LANGUAGE_MODELS

Folder = Callable[[str], str]
QUESTION = "What is written on the sign?"
TOWERS = ("clip_vision_model", "siglip", "dinov2", "aimv2_vision_model", "siglip_vision_model")
PAIRS = [
    (kind, TOWERS[number % len(TOWERS)], ("linear", "mlp2x_gelu")[number % 2])
    for number, kind in enumerate(LANGUAGE_MODELS)
]


def _save(kind: str, tower: str, projector: str, folder: Path) -> tuple[Any, Any]:
    parts = ModelConfig(language_model=kind, vision_tower=tower, projector_type=projector, dtype="float32")  # type: ignore[arg-type]
    model, processor = build_model(parts)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # so that a cap of the logits shows
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize(("kind", "tower_kind", "projector"), PAIRS)
def test_stock_transformers_gives_our_logits_and_answers(
    kind: str,
    tower_kind: str,
    projector: str,
    language_model: Folder,
    tower: Folder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours, processor = _save(language_model(kind), tower(tower_kind), projector, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "stock", to="hf-llava")
    theirs, loading = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "stock", dtype="float32", output_loading_info=True
    )
    assert not any(loading.values())
    their_processor = AutoProcessor.from_pretrained(tmp_path / "stock")
    assert (type(theirs), type(their_processor)) == (LlavaForConditionalGeneration, LlavaProcessor)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = their_processor.apply_chat_template(messages, add_generation_prompt=True)
    image = Image.linear_gradient("L").convert("RGB").resize((90, 60))
    inputs = their_processor(images=[image], text=[text], return_tensors="pt", add_special_tokens=False)
    assert torch.equal(inputs["input_ids"], processor.encode_question(QUESTION))
    options = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        expected, got = ours(**inputs).logits, theirs.eval()(**inputs).logits
        assert torch.equal(ours.generate(**inputs, **options), theirs.generate(**inputs, **options))
    cap = getattr(ours.config.text_config, "final_logit_softcapping", None)
    assert (cap is None) == (kind != "gemma2")
    assert ("neither caps nor scales logits" in caplog.text) == (cap is not None)
    if cap is not None:
        assert not torch.allclose(got, expected, atol=1e-3)
        got = cap * torch.tanh(got / cap)
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "tower_kind", "to", "words"),
    [
        ("qwen2", "clip_vision_model", "original", "language models LLaMA and Mistral only .got 'qwen2'"),
        ("mistral", "siglip", "original", "vision tower CLIP only .got 'siglip_vision_model'"),
        ("qwen2", "dinov2_with_registers", "hf-llava", "one position of the tower at most"),
        ("qwen2", "dinov3_vit", "hf-llava", "does not find the tensors of a dinov3_vit"),
    ],
)
def test_what_a_layout_cannot_express_is_named(
    kind: str, tower_kind: str, to: Any, words: str, language_model: Folder, tower: Folder, tmp_path: Path
) -> None:
    _save(language_model(kind), tower(tower_kind), "linear", tmp_path / "model")
    with pytest.raises(ConfigError, match=words) as error:
        export(tmp_path / "model", tmp_path / "out", to=to)
    fix = str(error.value).partition("Fix: ")[2]
    other: Any = "hf-llava" if "hf-llava" in fix else "llavar"
    export(tmp_path / "model", tmp_path / "other", to=other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]
    again, _ = build_model(ModelConfig(checkpoint=str(tmp_path / "other"), dtype="float32"))
    stored, _ = build_model(ModelConfig(checkpoint=str(tmp_path / "model"), dtype="float32"))
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in stored.state_dict().items())


def test_a_tower_that_vllm_lacks_is_named(language_model: Folder, tower: Folder, tmp_path: Path) -> None:
    _save(language_model("llama"), tower("dinov2"), "linear", tmp_path / "model")
    with pytest.raises(ConfigError, match=r"no such vision tower \(got 'dinov2', expected one of 'clip_vision_model'"):
        export(tmp_path / "model", tmp_path / "out", to="hf-llava", projector="two-sided")
    assert not (tmp_path / "out").exists()
