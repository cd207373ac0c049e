"""Exports in other engines, by the script that writes the table of engines; each engine has an environment of its own.

``LLAVAR_OLD_TRANSFORMERS`` and ``LLAVAR_VLLM`` name the interpreters of environments with transformers 4 and with vLLM.
Without a variable, the tests of its engine are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import llavar_peft
from llavar_peft import ModelConfig, build_model, export
from llavar_peft.recipe.resolution import Tiles
from tests.weights.adapters import LANGUAGE_MODEL, VISION_TOWER

MODERN = Path(llavar_peft.__file__).parent / "assets/tiny_modern"

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OLD = os.environ.get("LLAVAR_OLD_TRANSFORMERS", "")
VLLM = os.environ.get("LLAVAR_VLLM", "")


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("engines")


def _save(folder: Path, *, tiles: bool = False) -> Path:
    """Save a model that was not trained, whose rotary embeddings do not have the base that is the default."""
    shutil.copytree(LANGUAGE_MODEL, folder.with_name("language_model"))
    path = folder.with_name("language_model") / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("rope_theta", None)
    path.write_text(json.dumps({**config, "rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}))
    parts = ModelConfig(
        language_model=str(path.parent), vision_tower=str(VISION_TOWER), dtype="float32",
        resolution=Tiles(max_tiles=3) if tiles else None,
    )  # fmt: skip
    return _save_parts(parts, folder)


def _save_parts(parts: ModelConfig, folder: Path) -> Path:
    model, processor = build_model(parts)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_widened_model_computes_the_same(engines: Any, tmp_path: Path) -> None:
    engines.widen(_save(tmp_path / "model"), tmp_path / "wide")
    ids = torch.tensor([[1, 40, 41, 861, *[860] * 144, 862, 43]])
    pixels = torch.randn(1, 3, 120, 120, generator=torch.Generator().manual_seed(0))
    logits = []
    for name in ("model", "wide"):
        model, _ = build_model(ModelConfig(checkpoint=str(tmp_path / name), dtype="float32"))
        with torch.no_grad():
            logits.append(model(input_ids=ids, pixel_values=pixels).logits)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-5)
    export(tmp_path / "wide", tmp_path / "out", to="hf-llava", projector="two-sided")


@pytest.mark.skipif(not OLD, reason="LLAVAR_OLD_TRANSFORMERS is not set")
@pytest.mark.parametrize("tiles", [False, True])
def test_transformers_4_gives_the_answers_of_5(tiles: bool, engines: Any, tmp_path: Path) -> None:
    export(_save(tmp_path / "model", tiles=tiles), tmp_path / "stock", to="hf-llava")
    asked = []
    for number in range(6):
        path = tmp_path / f"{number}.png"
        Image.linear_gradient("L").convert("RGB").rotate(60 * number).resize((300, 90 + 20 * number)).save(path)
        asked.append((str(path), "What is written?"))
    job = {"model": str(tmp_path / "stock"), "questions": asked, "tokens": 12, "image_first": False}
    row = engines.ROWS["transformers"]
    new, old = (engines.ask(row, python, job, tmp_path) for python in (sys.executable, OLD))
    assert (new["version"][:2], old["version"][:2]) == ("5.", "4.")
    assert new["answers"] == old["answers"]
    assert len(set(new["answers"])) > 1


@pytest.mark.skipif(not VLLM, reason="LLAVAR_VLLM is not set")
@pytest.mark.parametrize("kind", ["tiles", "modern"])
def test_vllms_own_llava_runs_other_parts(kind: str, engines: Any, tmp_path: Path) -> None:
    """With tiles, and with SigLIP, Qwen 2 and an MLP, which needs no option."""
    if kind == "tiles":
        _save(tmp_path / "model", tiles=True)
    else:
        parts = ModelConfig(
            language_model=str(MODERN / "language_model"), vision_tower=str(MODERN / "vision_tower"),
            dtype="float32", template="chat", projector_type="mlp2x_gelu",
        )  # fmt: skip
        _save_parts(parts, tmp_path / "model")
    row = "vllm-linear" if kind == "tiles" else "vllm-two-sided"
    found = engines.compare(tmp_path / "model", {row: engines.ROWS[row]}, {"vllm": VLLM}, tmp_path, count=8, tokens=16)
    assert found[row]["equal"] == found[row]["of"] == 8


@pytest.mark.skipif(not VLLM, reason="LLAVAR_VLLM is not set")
@pytest.mark.parametrize("row", ["vllm-transformers", "vllm-linear", "vllm-two-sided"])
def test_vllm_gives_our_answers(row: str, engines: Any, tmp_path: Path) -> None:
    model = os.environ.get("LLAVAR_ENGINES_MODEL") or _save(tmp_path / "model")
    rows = {row: engines.ROWS[row]}
    found = engines.compare(Path(model), rows, {"vllm": VLLM}, tmp_path, count=8, tokens=16)
    assert found[row]["equal"] == found[row]["of"] == 8
