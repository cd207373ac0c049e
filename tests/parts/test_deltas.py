"""Deltas to language models of many kinds: the rule of the released format, tied heads, new rows, and adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llavar_peft import Lora, ModelConfig, apply_delta, build_model, make_delta
from llavar_peft.errors import ConfigError, WeightsError
from llavar_peft.weights.delta.verify_delta import verify_delta
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.tensor_blocks import open_weights
from llavar_peft.weights.io.weights_fingerprint import FINGERPRINT_FILE
from tests.weights.adapters import save_moved_adapter

Folder = Callable[[str], str]
KINDS = (
    ("qwen2", "bfloat16"),  # a tied head, here stored twice, and spare rows
    ("gemma2", "bfloat16"),  # norms that are stored as differences from 1
    ("gemma3_text", "float16"),  # several kinds of positions
    ("mistral", "bfloat16"),  # a new row of an untied head
    ("llama", "float16"),  # scaled positions
)


def _in_dtype(folder: str, out: Path, dtype: torch.dtype, *, head: bool = False) -> Path:
    """Copy a language model in a dtype, with its tied head stored twice if asked for."""
    shutil.copytree(folder, out)
    tensors = {name: one.to(dtype) for name, one in load_file(out / "model.safetensors").items()}
    if head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _trained(base: Path, tower: str, out: Path, dtype: str) -> Any:
    """Save a model with images made from a base, every tensor of which is changed, and return it and its processor."""
    model, processor = build_model(ModelConfig(language_model=str(base), vision_tower=tower, dtype=dtype))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(tensor_names.TOWER):
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.02)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return model, processor


def _by_hand(base: Path, target: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make a delta as LLaVAR, llava/model/make_delta.py, does: common rows as differences, everything else verbatim."""
    old = open_weights(base)
    delta = {
        name: tensor.to(dtype)
        for ours, tensor in open_weights(target).items()
        if (name := tensor_names.to_released(ours)) is not None
    }
    for name, tensor in delta.items():
        if name in old:
            tensor[: old[name].shape[0]] -= old[name].to(dtype)
    return delta


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_a_delta_is_the_difference_and_gives_the_model_again(
    kind: str, dtype: str, language_model: Folder, tower: Folder, tmp_path: Path
) -> None:
    half = getattr(torch, dtype)
    base = _in_dtype(language_model(kind), tmp_path / "base", half, head=kind == "qwen2")
    model, processor = _trained(base, tower("siglip_vision_model"), tmp_path / "target", dtype)
    make_delta(base, tmp_path / "target", tmp_path / "delta")
    expected = _by_hand(base, tmp_path / "target", half)
    got = open_weights(tmp_path / "delta")
    assert set(got) == set(expected)
    assert ("lm_head.weight" in got) != model.config.tie_word_embeddings
    assert all(torch.equal(got[name], tensor) and got[name].dtype == half for name, tensor in expected.items())

    apply_delta(base, tmp_path / "delta", tmp_path / "applied")
    old, applied = open_weights(base), open_weights(tmp_path / "applied")
    for name, tensor in expected.items():
        if name in old:
            tensor[: old[name].shape[0]] += old[name]
        assert torch.equal(applied[name], tensor), name
    check = verify_delta(base, tmp_path / "delta", target=tmp_path / "target")
    assert (check.base, check.compared) == ("fingerprint", True)
    assert check.differing < 0.2 * check.elements

    again, their_processor = build_model(
        ModelConfig(
            checkpoint=str(tmp_path / "applied"),
            vision_tower=tower("siglip_vision_model"),
            dtype=dtype,  # type: ignore[arg-type]
        )
    )
    ours, theirs = (one.config.text_config.to_dict() for one in (model, again))
    assert theirs == {**ours, "architectures": None, "_name_or_path": theirs["_name_or_path"]}
    assert (their_processor.template, their_processor.chat_template) == ("chat", processor.chat_template)
    ids = processor.encode_question("What is written on the sign?")
    assert torch.equal(their_processor.encode_question("What is written on the sign?"), ids)
    stored = {tensor_names.to_released(name): one for name, one in again.state_dict().items()}
    assert all(torch.equal(stored[name], one) for name, one in applied.items() if "embed_tokens" not in name)


@pytest.mark.parametrize("kind", ["qwen2", "gemma2", "mistral"])
def test_the_adapter_of_a_plain_language_model_becomes_a_delta(
    kind: str, language_model: Folder, tower: Folder, tmp_path: Path
) -> None:
    base = language_model(kind)
    parts = ModelConfig(language_model=base, vision_tower=tower("siglip_vision_model"), dtype="float32")
    wrapped = save_moved_adapter(tmp_path / "adapter", parts, Lora(rank=4, alpha=8, dropout=0.0))
    make_delta(base, base, tmp_path / "delta", adapter=tmp_path / "adapter")
    apply_delta(base, tmp_path / "delta", tmp_path / "applied")
    applied, processor = build_model(
        ModelConfig(checkpoint=str(tmp_path / "applied"), vision_tower=parts.vision_tower, dtype="float32")
    )
    inputs = {
        "input_ids": processor.encode_question("What is written on the sign?"),
        "pixel_values": torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0)),
    }
    with torch.no_grad():
        expected, got = wrapped(**inputs).logits, applied(**inputs).logits
    assert float((got - expected).std() / expected.std()) < 0.02  # the delta and its sum are rounded to fp16


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_wrong_roles_and_bases_are_named(kind: str, language_model: Folder, tower: Folder, tmp_path: Path) -> None:
    base = _in_dtype(language_model(kind), tmp_path / "base", torch.bfloat16)
    _trained(base, tower("siglip_vision_model"), tmp_path / "target", "bfloat16")
    delta = tmp_path / "delta"
    make_delta(base, tmp_path / "target", delta)
    checkpoint = ModelConfig(checkpoint=str(delta), vision_tower=tower("siglip_vision_model"))
    for attempt, words in (
        (lambda: make_delta(base, base, tmp_path / "out"), "the target is the base"),
        (lambda: make_delta(base, delta, tmp_path / "out"), "a delta, expected complete weights"),
        (lambda: apply_delta(delta, delta, tmp_path / "out"), "a delta, expected complete weights"),
        (lambda: apply_delta(base, tmp_path / "target", tmp_path / "out"), "complete weights, expected a delta"),
        (lambda: build_model(checkpoint), "a delta, expected complete weights"),
    ):
        with pytest.raises(ConfigError, match=words):
            attempt()
    other = _in_dtype(str(base), tmp_path / "other", torch.bfloat16)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 0.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="not the base"):
        apply_delta(other, delta, tmp_path / "out")
    (delta / FINGERPRINT_FILE).unlink()
    with pytest.raises((ConfigError, WeightsError), match=f"expected a delta|no {FINGERPRINT_FILE}"):
        apply_delta(base, delta, tmp_path / "out")
    apply_delta(base, delta, tmp_path / "out", force=True)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
