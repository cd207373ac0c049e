"""Faults during a run: damaged checkpoints, full disks, losses that are not finite, changed data, too little memory."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from llavar_peft import Full, Lora, Recipe
from llavar_peft.errors import ConfigError, EnvironmentFaultError, InterruptedRunError
from llavar_peft.training.checkpoint_folders import (
    MANIFEST,
    RunInputs,
    check_same_inputs,
    commit_checkpoint,
    find_checkpoint_fault,
    list_checkpoints,
    newest_valid_checkpoint,
)
from llavar_peft.training.optimizer_step import StepCounts, check_finite, fetch_figures
from llavar_peft.training.out_of_memory import memory_remedies
from llavar_peft.training.run_folder import lock_folder
from tests.training.test_resume import SignalAt, _figures, _train, _weights


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit": lambda folder: _flip(folder / "model.safetensors"),
    "a cut file": lambda folder: os.truncate(folder / "optimizer.pt", 1000),
    "a missing file": lambda folder: (folder / "rng_state.pth").unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "half a manifest": lambda folder: os.truncate(folder / MANIFEST, 40),
    "another kind of manifest": lambda folder: _forget(folder / MANIFEST),
}


def _forget(path: Path) -> None:
    path.write_text("[]")


def _one_stage(recipe: Recipe, **changes: Any) -> Recipe:
    stage = dataclasses.replace(recipe.stages[1], **changes)
    return dataclasses.replace(recipe, stages=(stage,), model=recipe.model)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Two complete checkpoints of a few files."""
    directory = tmp_path / "stage"
    for step in (1, 2):
        staged = directory / f".staging/checkpoint-{step}"
        staged.mkdir(parents=True)
        for name in ("model.safetensors", "optimizer.pt", "rng_state.pth"):
            (staged / name).write_bytes(os.urandom(5000))
        commit_checkpoint(staged, directory / f"checkpoint-{step}", RunInputs(1, {"records.json": "0"}))
    return directory


@pytest.mark.parametrize("how", DAMAGE)
def test_a_broken_checkpoint_is_renamed_and_the_one_before_is_used(
    how: str, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest_valid_checkpoint(saved) == saved / "checkpoint-2"
    DAMAGE[how](saved / "checkpoint-2")
    assert newest_valid_checkpoint(saved) == saved / "checkpoint-1"
    assert sorted(path.name for path in saved.glob("checkpoint*")) == ["checkpoint-1", "checkpoint-2.broken"]
    assert "renamed to checkpoint-2.broken" in caplog.text
    assert list_checkpoints(saved) == [saved / "checkpoint-1"]
    # A second broken checkpoint of the same step does not replace the first.
    shutil.copytree(saved / "checkpoint-1", saved / "checkpoint-2")
    DAMAGE[how](saved / "checkpoint-2")
    assert newest_valid_checkpoint(saved) == saved / "checkpoint-1"
    assert (saved / "checkpoint-2.broken-2").is_dir()


def test_every_byte_of_a_checkpoint_is_verified(saved: Path) -> None:
    folder = saved / "checkpoint-1"
    assert find_checkpoint_fault(folder) is None
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST:
            before = path.read_bytes()
            _flip(path)
            assert path.name in (find_checkpoint_fault(folder) or "")
            path.write_bytes(before)
    assert find_checkpoint_fault(folder) is None


@pytest.mark.slow
def test_a_run_resumes_from_the_last_valid_checkpoint_with_the_same_result(tiny_recipe: Recipe, tmp_path: Path) -> None:
    whole = dataclasses.replace(
        _one_stage(tiny_recipe, epochs=2, save_every_steps=2, keep_checkpoints=2), output_dir=str(tmp_path / "whole")
    )
    expected = _weights(_train(whole))
    halved = dataclasses.replace(whole, output_dir=str(tmp_path / "halved"))
    with pytest.raises(InterruptedRunError):
        _train(halved, (SignalAt(4, signal.SIGTERM),))
    directory = tmp_path / "halved/stage2"
    assert [path.name for path in list_checkpoints(directory)] == ["checkpoint-4", "checkpoint-5"]
    _flip(directory / "checkpoint-5/optimizer.pt")
    ours = _weights(_train(halved))
    assert _figures(halved, "stage2") == _figures(whole, "stage2")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


class DiskFullAt(TrainerCallback):  # type: ignore[misc]
    """Limits files to 100 kB while these steps are saved, so that writes fail as on a full disk."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _limit_files(100_000 if state.global_step + 1 in self.steps else None)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _limit_files(None)


def _limit_files(size: int | None) -> None:
    import resource

    sys.dont_write_bytecode = size is not None  # Python would leave truncated compiled modules
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if size is None else size, most))


@pytest.fixture
def full_disk() -> Any:
    pytest.importorskip("resource", reason="limits files by setrlimit")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield DiskFullAt
    _limit_files(None)
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.slow
def test_a_run_continues_without_a_checkpoint_that_the_full_disk_prevented(
    full_disk: Any, tiny_recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = _one_stage(tiny_recipe, save_every_steps=1)
    expected = _weights(_train(dataclasses.replace(recipe, output_dir=str(tmp_path / "whole"))))
    ours = _weights(_train(recipe, (full_disk(2),)))
    assert "checkpoint-2: not saved, the disk is full; checkpoint-1 is kept; training continues" in caplog.text
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_disk_that_stays_full_stops_the_run_which_can_be_resumed(
    full_disk: Any, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = _one_stage(tiny_recipe, save_every_steps=1)
    expected = _weights(_train(dataclasses.replace(recipe, output_dir=str(tmp_path / "whole"))))
    with pytest.raises(EnvironmentFaultError, match=r"the disk is full; checkpoint-1 is kept. Fix: free") as stopped:
        _train(recipe, (full_disk(2, 3),))
    assert stopped.value.exit_code == 3
    _limit_files(None)
    directory = Path(recipe.output_dir) / "stage2"
    assert [path.name for path in directory.glob("*checkpoint*")] == ["checkpoint-1"]
    assert not (directory / ".staging").exists()
    ours = _weights(_train(recipe))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_a_result_that_does_not_fit_on_the_disk_is_named(full_disk: Any, tiny_recipe: Recipe) -> None:
    class FullAtTheEnd(TrainerCallback):  # type: ignore[misc]
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _limit_files(100_000)

    recipe = _one_stage(tiny_recipe)
    with pytest.raises(EnvironmentFaultError, match=r"run.model: not saved, the disk is full. Fix: free"):
        _train(recipe, (FullAtTheEnd(),))
    _limit_files(None)
    assert not [path.name for path in Path(recipe.output_dir).iterdir() if "model" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize("clipped", [1.0, 0.0])
def test_a_loss_that_is_not_finite_stops_before_the_step(clipped: float, tiny_recipe: Recipe) -> None:
    optim = dataclasses.replace(
        tiny_recipe.stages[1].optim, learning_rate=1e30, warmup_ratio=0.0, max_grad_norm=clipped
    )
    recipe = _one_stage(tiny_recipe, optim=optim, save_every_steps=1)
    with pytest.raises(EnvironmentFaultError, match=r"stage2:step 2: the loss is not finite, records \w+") as stopped:
        _train(recipe)
    assert stopped.value.exit_code == 3
    assert not (Path(recipe.output_dir) / "model").exists()


def test_the_micro_batch_at_fault_is_named() -> None:
    accelerator = Accelerator(cpu=True)
    good, bad = torch.tensor(1.0), torch.tensor(float("nan"))
    losses = [(good, ("a", "b")), (bad, ("c", "d")), (good, ("e",))]

    def check(number: int, norm: float) -> None:
        counts = StepCounts(losses=losses[:number])
        figures = fetch_figures(accelerator, counts, torch.tensor(norm))
        check_finite(accelerator, counts, figures, where="s:step 1")

    check(1, 1.0)
    with pytest.raises(EnvironmentFaultError, match=r"^s:step 1: the loss is not finite, records c, d. Fix"):
        check(3, float("nan"))
    with pytest.raises(EnvironmentFaultError, match=r"the gradient is not finite \(norm inf\), records a, b. Fix"):
        check(1, float("inf"))


@pytest.mark.slow
def test_changed_records_are_rejected_unless_allowed(tiny_recipe: Recipe, tiny_data: Path, tmp_path: Path) -> None:
    records = tmp_path / "records.json"
    shutil.copyfile(tiny_data / "records.json", records)
    data = dataclasses.replace(tiny_recipe.stages[1].data, records=str(records))
    recipe = _one_stage(tiny_recipe, data=data)
    with pytest.raises(InterruptedRunError):
        _train(recipe, (SignalAt(1, signal.SIGINT),))
    changed = json.loads(records.read_text())
    changed[0]["conversations"][1]["value"] += " INDEED"
    records.write_text(json.dumps(changed))
    with pytest.raises(ConfigError, match=r"data\.records: changed: .*records\.json") as refused:
        _train(recipe)
    assert "--allow-changes" in str(refused.value)
    assert len(_weights(_train(recipe, allow_changes=True))) > 0


def test_another_number_of_processes_is_rejected(saved: Path) -> None:
    origin = RunInputs(1, {"records.json": "0"})
    check_same_inputs(saved / "checkpoint-1", origin)
    # The path of a file does not matter.
    check_same_inputs(saved / "checkpoint-1", RunInputs(1, {"moved/records.json": "0"}))
    with pytest.raises(ConfigError, match=r"ranks: changed \(was 1, is 8"):
        check_same_inputs(saved / "checkpoint-1", dataclasses.replace(origin, ranks=8))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a forked process holds the folder")
def test_two_runs_in_one_folder_are_rejected(tiny_recipe: Recipe) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with lock_folder(Path(tiny_recipe.output_dir)):
            os.write(writer, b"!")
            signal.pause()
    os.read(reader, 1)
    try:
        with pytest.raises(EnvironmentFaultError, match=f"another run is active in this folder .process {child} on"):
            _train(tiny_recipe)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with lock_folder(Path(tiny_recipe.output_dir)):  # a process that dies releases the lock
        pass
    assert not (Path(tiny_recipe.output_dir) / ".lock").exists()


class TooMuch(TrainerCallback):  # type: ignore[misc]
    """Allocates more memory than any machine has."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.empty(2**50)


@pytest.mark.slow
def test_too_little_memory_is_explained(tiny_recipe: Recipe) -> None:
    with pytest.raises(EnvironmentFaultError, match=r"stage stage2: out of memory \(.* GiB.*gradient_checkpointing"):
        _train(_one_stage(tiny_recipe), (TooMuch(),))


def test_remedies_are_settings_not_in_use_with_those_first_that_keep_the_result(tiny_recipe: Recipe) -> None:
    stage = dataclasses.replace(tiny_recipe.stages[1], micro_batch_size=4, max_length=2048)
    found = memory_remedies(stage, tiny_recipe.model, ranks=1)
    assert [one.split()[1] for one in found] == ["gradient_checkpointing:", "max_tokens:", "tune:", "max_length:"]
    frugal = dataclasses.replace(
        stage, gradient_checkpointing=True, micro_batch_size=1, tune=Lora(), max_length=512, packing=False
    )
    model = dataclasses.replace(tiny_recipe.model, quantize="nf4")
    assert memory_remedies(frugal, model, ranks=1) == []
    assert memory_remedies(dataclasses.replace(frugal, tune=Full()), tiny_recipe.model, ranks=8)[0].startswith("shard")
