"""Deltas are bit-equal to those of the original's ``make_delta`` and ``apply_delta``."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llavar_peft import apply_delta, make_delta, verify_delta
from llavar_peft.errors import WeightsError
from llavar_peft.weights.io.tensor_blocks import open_weights
from llavar_peft.weights.io.weights_fingerprint import FINGERPRINT_FILE

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> Path:
    folder = shared_dir / "golden"
    if not (folder / "delta").is_dir():
        pytest.skip(f"the original's deltas are not at {folder / 'delta'}")
    return folder


@pytest.fixture(scope="module")
def summary(golden: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((golden / "delta/summary.json").read_text())
    return content


def _hashes(folder: Path) -> dict[str, str]:
    tensors = open_weights(folder)
    return {name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def _expected(summary: dict[str, Any], key: str) -> dict[str, str]:
    # Frequencies of RoPE are computed; the original copied them.
    return {name: fields[key] for name, fields in summary["tensors"].items() if not name.endswith("inv_freq")}


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_bytes_equal_the_originals(form: str, golden: Path, summary: dict[str, Any], tmp_path: Path) -> None:
    base, target = golden / "train/vicuna-tiny-v1", golden / "model/llava-tiny-v1"
    released = golden / "delta/llava-tiny-v1-delta"
    make_delta(base, target, tmp_path / "delta", form=form, shard_size=5_000_000)
    assert _hashes(tmp_path / "delta") == _expected(summary, "sha256_delta")
    apply_delta(base, released, tmp_path / "applied", form=form, shard_size=5_000_000)
    assert _hashes(tmp_path / "applied") == _expected(summary, "sha256_reapplied")
    config = json.loads((tmp_path / "delta/config.json").read_text())
    assert {**config, "_name_or_path": "llava-tiny-v1"} == json.loads((released / "config.json").read_text())
    for name in ("tokenizer.model", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        assert (tmp_path / "applied" / name).read_bytes() == (released / name).read_bytes()


def test_the_rounding_equals_the_originals(golden: Path, summary: dict[str, Any]) -> None:
    check = verify_delta(
        golden / "train/vicuna-tiny-v1",
        golden / "delta/llava-tiny-v1-delta",
        target=golden / "model/llava-tiny-v1",
    )
    assert check.base == "statistics"
    assert check.differing == summary["total_diff"]


def test_a_base_that_the_original_accepted_silently_is_rejected(
    golden: Path, summary: dict[str, Any], tmp_path: Path
) -> None:
    base, released = golden / "train/vicuna-tiny-v1", golden / "delta/llava-tiny-v1-delta"
    skipped = ("inv_freq", "mm_projector.weight", "mm_projector.bias")  # no parameters of a LLaMA
    expected = {name: fields for name, fields in summary["wrong_base"].items() if not name.endswith(skipped)}
    wrong = _change(base, tmp_path / "wrong", list(expected))
    assert _hashes(wrong) == {name: fields["sha256_wrong_base"] for name, fields in expected.items()}
    with pytest.raises(WeightsError, match="cannot result from this base"):
        apply_delta(wrong, released, tmp_path / "out")
    apply_delta(wrong, released, tmp_path / "out", force=True)
    applied = _hashes(tmp_path / "out")
    for name, fields in expected.items():
        assert applied[name] == fields["sha256_applied"]
    make_delta(base, golden / "model/llava-tiny-v1", tmp_path / "delta")
    assert (tmp_path / "delta" / FINGERPRINT_FILE).is_file()
    with pytest.raises(WeightsError, match="its fingerprint differs"):
        apply_delta(wrong, tmp_path / "delta", tmp_path / "out2")


def _change(base: Path, out: Path, order: list[str]) -> Path:
    """Write the other base, as described in the README of the folder."""
    draw = np.random.RandomState(4321)
    tensors = {name: tensor.clone() for name, tensor in open_weights(base).items() if not name.endswith("inv_freq")}
    for name in order:
        tensor = tensors[name]
        rows = torch.arange(len(tensor)) % 1000 == 7 if tensor.dim() == 2 else torch.ones(len(tensor), dtype=torch.bool)
        tensor[rows] += torch.from_numpy(draw.randint(-4, 5, size=tuple(tensor[rows].shape)) / 8).half()
    out.mkdir()
    shutil.copy(base / "config.json", out)
    torch.save(tensors, out / "pytorch_model.bin")
    return out
