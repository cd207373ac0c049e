"""The script that makes the shipped tiny parts: it makes them, from nothing, and the same ones each time."""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    LlamaForCausalLM,
)

from llavar_peft import ModelConfig, build_model
from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.data.encode_record import encode_record

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples/tiny_parts/make_tiny_parts.py"
SHIPPED = ROOT / "llavar_peft/assets/tiny"
MODERN = ROOT / "llavar_peft/assets/tiny_modern"


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the script run in this process, whose settings it changes."""
    threads, modules = torch.get_num_threads(), set(sys.modules)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    for name in set(sys.modules) - modules:
        if (file := getattr(sys.modules[name], "__file__", None)) and Path(file).parent == SCRIPT.parent:
            del sys.modules[name]


def _make(out: Path, parts: str = "llavar", *, process: bool = False) -> dict[str, str]:
    arguments = [str(SCRIPT), "--parts", parts, "--out", str(out), "--scale", "0.0001"]
    if process:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True, timeout=600)
    else:
        sys.argv = arguments
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(os.environ.get("LLAVAR_QUICKSTART") != "all", reason="LLAVAR_QUICKSTART=all makes the parts twice")
@pytest.mark.usefixtures("same_process")
def test_two_runs_write_the_same_files(tmp_path: Path) -> None:
    """In processes that hash strings differently, and draw other random numbers before."""
    torch.manual_seed(1)
    first, second = _make(tmp_path / "one"), _make(tmp_path / "two", process=True)
    assert first == second
    _check_against_shipped(tmp_path / "one", first, SHIPPED)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("same_process")
def test_the_script_makes_the_modern_parts(tmp_path: Path) -> None:
    _check_against_shipped(tmp_path / "made", _make(tmp_path / "made", "modern"), MODERN)


def _check_against_shipped(made: Path, hashes: dict[str, str], shipped: Path) -> None:
    # What needs no training is the shipped file to the byte; what does has the shipped names and shapes.
    for name in ("vision_tower/preprocessor_config.json", "language_model/tokenizer.json"):
        assert hashlib.sha256((shipped / name).read_bytes()).hexdigest() == hashes[name]
    for part in ("vision_tower", "language_model"):
        ours, theirs = (load_file(root / part / "model.safetensors") for root in (made, shipped))
        assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}


def test_the_shipped_parts_are_ordinary_folders() -> None:
    tower = CLIPVisionModel.from_pretrained(SHIPPED / "vision_tower")
    model = LlamaForCausalLM.from_pretrained(SHIPPED / "language_model")
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "language_model")
    assert json.loads((SHIPPED / "vision_tower/config.json").read_text())["model_type"] == "clip_vision_model"
    assert len(tokenizer) == model.config.vocab_size
    text = "Which number is on the sign? 12.50 naïve"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    pixels = torch.zeros(1, 3, tower.config.image_size, tower.config.image_size)
    assert torch.isfinite(tower(pixels).last_hidden_state).all()
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 6_000_000


def test_the_modern_parts_are_ordinary_folders() -> None:
    language, vision = MODERN / "language_model", MODERN / "vision_tower"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(language), AutoTokenizer.from_pretrained(language)
    assert model.config.model_type == "qwen2"
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert len(tokenizer) < model.config.vocab_size  # spare rows
    assert tokenizer.bos_token is None
    text = "<|im_start|>Which number is on the sign? 12.50 naïve 日本<|im_end|>\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    tower, images = AutoModel.from_pretrained(vision), AutoImageProcessor.from_pretrained(vision)
    assert tower.config.model_type == "siglip_vision_model"
    side = tower.config.image_size
    assert dict(images.size) == {"height": side, "width": side}
    assert list(images.image_mean) == list(images.image_std) == [0.5, 0.5, 0.5]
    states = tower(torch.zeros(1, 3, side, side)).last_hidden_state
    assert states.shape[1] == (side // tower.config.patch_size) ** 2  # no class token
    assert torch.isfinite(states).all()
    assert sum(path.stat().st_size for path in MODERN.rglob("*") if path.is_file()) < 5_000_000


def test_the_modern_parts_make_a_model_that_writes_its_tokenizers_chat_template() -> None:
    model, processor = build_model(
        ModelConfig(
            language_model=str(MODERN / "language_model"), vision_tower=str(MODERN / "vision_tower"),
            projector_type="mlp2x_gelu", template="chat",
        )
    )  # fmt: skip
    turns = [("human", "<image>\nWho is the author?"), ("gpt", "KHABE"), ("human", "And the title?"), ("gpt", "X 12")]
    record = {"id": "1", "image": "a.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    example = encode_record(record, processor, 512)
    names = {"human": "user", "gpt": "assistant"}
    expected = processor.tokenizer.apply_chat_template(
        [{"role": names[who], "content": text} for who, text in turns],
        return_dict=True, return_assistant_tokens_mask=True,
    )  # fmt: skip
    ids, masks = list[int](), list[int]()
    for index, mask in zip(expected["input_ids"], expected["assistant_masks"], strict=True):
        count = processor.num_image_tokens if index == processor.image_token_id else 1
        ids += [index] * count
        masks += [mask] * count
    assert example.input_ids.tolist() == ids
    assert [label != IGNORE_INDEX for label in example.labels.tolist()] == [bool(mask) for mask in masks]
    # The tokenizer has no token for the start of a text, and a prompt gets none.
    assert processor(text="What?")["input_ids"] == processor.tokenizer(["What?"])["input_ids"]
    assert model.config.tie_word_embeddings
