"""The script that makes the shipped tiny parts: it makes them, from nothing, and the same ones each time."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "llavar_peft/assets/tiny"


def _make(out: Path) -> dict[str, str]:
    subprocess.run(
        [sys.executable, str(ROOT / "examples/tiny_parts/make_tiny_parts.py"), "--out", str(out), "--scale", "0.0001"],
        check=True,
        capture_output=True,
        timeout=600,
    )
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_runs_write_the_same_files(tmp_path: Path) -> None:
    first, second = _make(tmp_path / "one"), _make(tmp_path / "two")
    assert first == second
    # What needs no training is the shipped file to the byte; what does has the shipped names and shapes.
    for name in ("vision_tower/preprocessor_config.json", "language_model/tokenizer.json"):
        assert hashlib.sha256((SHIPPED / name).read_bytes()).hexdigest() == first[name]
    for part in ("vision_tower", "language_model"):
        made, shipped = (load_file(root / part / "model.safetensors") for root in (tmp_path / "one", SHIPPED))
        assert {k: (v.shape, v.dtype) for k, v in made.items()} == {k: (v.shape, v.dtype) for k, v in shipped.items()}


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
