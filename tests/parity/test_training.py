"""Ten steps of each stage match the original's training: learning rates, losses, gradient norms, weights, rows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llavar_peft import (
    DataConfig,
    Full,
    ModelConfig,
    OptimConfig,
    Projector,
    Recipe,
    Stage,
    Trainer,
    build_model,
)
from llavar_peft.weights.io import tensor_names

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def golden(golden: Path) -> Path:
    return golden / "train"


def _model_config(golden: Path, projector: str | None = None) -> ModelConfig:
    return ModelConfig(
        language_model=str(golden / "vicuna-tiny-v1"),
        vision_tower=str(golden.parent / "model/clip-tiny-336"),
        projector=projector,
        dtype="float32",
    )


def _recipe(golden: Path, output: Path, *, number: int, rate: float, projector: str | None = None) -> Recipe:
    stage = Stage(
        name=f"stage{number}",
        data=DataConfig(
            records=str(golden / f"stage{number}.json"), images=str(golden / "images"), shuffle=False, workers=0
        ),
        tune=Projector() if number == 1 else Full(),
        optim=OptimConfig(learning_rate=rate),
        global_batch_size=2,
        micro_batch_size=2,
        max_length=2048,
        precision="fp32",
    )
    return Recipe(model=_model_config(golden, projector), stages=(stage,), output_dir=str(output))


def _set_initial_weights(model: Any, arrays: Any) -> None:
    """Load the arrays that the original initialised at random."""
    ours = {tensor_names.from_released(n.removeprefix("init:")): n for n in arrays.files if n.startswith("init:")}
    state = model.state_dict()
    for name, key in ours.items():
        rows = f"rows:{key.removeprefix('init:')}"
        value = torch.tensor(arrays[key])
        if rows in arrays.files:
            state[name][torch.tensor(arrays[rows]).long()] = value
        else:
            state[name].copy_(value)


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def _compare(golden: Path, output: Path, model: Any, *, number: int, before: dict[str, torch.Tensor]) -> None:
    folder = golden / f"stage{number}_out"
    summary = json.loads((folder / "summary.json").read_text())
    lines = [json.loads(line) for line in (output / f"stage{number}/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 10
    np.testing.assert_allclose([line["learning_rate"] for line in lines], summary["lrs"], rtol=1e-12)
    np.testing.assert_allclose([line["loss"] for line in lines], summary["losses"], atol=2e-5, rtol=0)
    np.testing.assert_allclose([line["grad_norm"] for line in lines], summary["grad_norms"], rtol=1e-5)
    after = model.state_dict()
    arrays = np.load(folder / "weights.npz")
    for key in [key for key in arrays.files if key.startswith("final:")]:
        released = key.removeprefix("final:")
        ours = after[tensor_names.from_released(released)]
        if f"rows:{released}" in arrays.files:
            ours = ours[torch.tensor(arrays[f"rows:{released}"]).long()]
        np.testing.assert_allclose(ours.numpy(), arrays[key], atol=2e-6, rtol=0, err_msg=released)
    for released, described in summary["tensors"].items():
        name = tensor_names.from_released(released)
        if name is None:
            continue
        changed = (after[name] != before[name]).reshape(after[name].shape[0], -1).any(dim=1).nonzero()[:, 0].tolist()
        if described["changed_rows"] == "many":
            assert len(changed) == described["n_changed_rows"], released
        else:
            assert changed == described["changed_rows"], released
        if not changed:
            assert _digest(after[name]) == described["sha256_final"], released
    tower = [name for name in after if name.startswith(tensor_names.TOWER)]
    assert tower
    assert all(torch.equal(after[name], before[name]) for name in tower)


@pytest.mark.slow
def test_ten_steps_of_stage_1(golden: Path, tmp_path: Path) -> None:
    recipe = _recipe(golden, tmp_path, number=1, rate=2e-3)
    model, processor = build_model(recipe.model)
    _set_initial_weights(model, np.load(golden / "stage1_out/weights.npz"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = Trainer(model, processor, recipe).train()
    _compare(golden, tmp_path, model, number=1, before=before)

    ours = torch.load(result / "mm_projector.bin", weights_only=True)
    theirs = torch.load(golden / "stage1_out/mm_projector.bin", weights_only=True)
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["mm_projector.bin", "mm_projector_2rows.bin"])
def test_ten_steps_of_stage_2_from_the_originals_stage_1(golden: Path, tmp_path: Path, file: str) -> None:
    recipe = _recipe(golden, tmp_path, number=2, rate=2e-5, projector=str(golden / "stage1_out" / file))
    model, processor = build_model(recipe.model)
    arrays = np.load(golden / "stage2_out/weights.npz")
    given = torch.tensor(arrays["init:model.mm_projector.weight"])
    assert torch.equal(model.model.multi_modal_projector.weight, given)
    _set_initial_weights(model, arrays)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Trainer(model, processor, recipe).train()
    _compare(golden, tmp_path, model, number=2, before=before)
