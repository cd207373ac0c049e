"""The private methods of ``transformers.Trainer`` that we override: their arguments, and when they are called."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME

from llavar_peft.compat.trainer_internals import TrainerInternals, allow_quantized_base

ARGUMENTS = {
    "_prepare_for_training": ["self", "max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_get_grad_norm": ["self", "model", "grad_norm"],
}


class _Line(nn.Module):
    """A model with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": ((self.weight * x - labels) ** 2).mean()}


class _Recorder(TrainerInternals):
    """Records the calls of the hooks, and of the public methods that the stage trainer overrides."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[str] = []
        super().__init__(*args, **kwargs)

    def load_weights(self, checkpoint: Path) -> None:
        assert self.optimizer is None
        self.calls.append("load_weights")

    def check_prepared(self, model: nn.Module) -> None:
        self.calls.append("check_prepared")

    def load_training_state(self, checkpoint: Path) -> None:
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        self.calls.append("load_training_state")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.calls.append("log" if "loss" in logs else "final log")
        super().log(logs, start_time)


class _Events(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.trainer: _Recorder | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        assert self.trainer.grad_norm > 0
        self.trainer.calls.append("on_pre_optimizer_step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.trainer.calls.append("on_step_end")
        control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        if control.should_save:
            # A callback of ``on_log`` that saves and resets the request keeps the parent from saving.
            self.trainer.calls.append("save")
            control.should_save = False


def _trainer(folder: Path, steps: int) -> _Recorder:
    items = [{"x": torch.tensor(float(n)), "labels": torch.tensor(2.0 * n)} for n in range(1, 9)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, logging_steps=1, report_to="none",
        use_cpu=True, disable_tqdm=True, remove_unused_columns=False, log_level="error",
    )  # fmt: skip
    events = _Events()
    trainer = _Recorder(model=_Line(), args=arguments, train_dataset=items, callbacks=[events])
    trainer.remove_callback(transformers.PrinterCallback)
    events.trainer = trainer
    return trainer


def test_the_private_methods_have_the_expected_arguments() -> None:
    for name, expected in ARGUMENTS.items():
        assert list(inspect.signature(getattr(transformers.Trainer, name)).parameters) == expected
    overridden = {
        name for name in vars(TrainerInternals) if name.startswith("_") and callable(getattr(TrainerInternals, name))
    }
    assert overridden - {"__doc__"} == set(ARGUMENTS)


def test_the_hooks_are_called_in_order_and_nothing_is_loaded_twice(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path / "run", 1)
    trainer.train()
    step = ["on_pre_optimizer_step", "on_step_end", "log", "save"]
    assert trainer.calls == ["check_prepared", *step, "final log"]
    assert not list((tmp_path / "run").glob("checkpoint-*"))

    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    trainer.state.save_to_json(str(checkpoint / TRAINER_STATE_NAME))
    resumed = _trainer(tmp_path / "run", 2)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.calls == ["load_weights", "check_prepared", "load_training_state", *step, "final log"]
    assert resumed.state.global_step == 2


def test_a_quantized_model_without_adapters_is_accepted_only_inside_the_context(tmp_path: Path) -> None:
    model: Any = _Line()
    model.is_quantized = True
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model=model, args=arguments)
    with allow_quantized_base(model):
        transformers.Trainer(model=model, args=arguments)
    assert model.is_quantized
