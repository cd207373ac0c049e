"""Cases that train: a recipe on the device of the process, with the numbers that tests look at."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from transformers import TrainerCallback

from llavar_peft import Recipe, Trainer, build_model
from llavar_peft.errors import InterruptedRunError
from llavar_peft.recipe.presets import load_recipe
from tests.gpu_sim.simulated_device import SYNCS


class StepRecorder(TrainerCallback):  # type: ignore[misc]
    """Records where the host waited in each optimizer step, up to the beginning of the next one.

    Args:
        interrupt_at: Number of steps after which the run gets a signal, to stop after the next one.
    """

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.interrupt_at = interrupt_at
        self.steps: list[dict[str, int]] = []
        self.devices: set[str] = set()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.devices |= {str(one.device) for one in model.parameters()}
        self.steps.append(dict(SYNCS))
        SYNCS.clear()
        if state.global_step == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGTERM)


class TrainedRun(NamedTuple):
    """A finished run and the objects that it leaves in memory."""

    figures: dict[str, Any]
    model: Any
    processor: Any


def train_recipe(recipe: Recipe, *, interrupt_at: int | None = None) -> TrainedRun:
    """Train a recipe; its figures are those of the last stage."""
    recorder = StepRecorder(interrupt_at)
    # CUDA is the only device that quantized weights are loaded onto by themselves.
    device = PartialState().device if recipe.model.quantize else None
    model, processor = build_model(recipe.model, device=device, seed=recipe.seed)
    trainer = Trainer(model, processor, recipe, callbacks=[recorder])
    figures: dict[str, Any] = {"result": str(trainer.train())}
    for file in ("metrics", "probe"):
        path = Path(recipe.output_dir) / recipe.stages[-1].name / f"{file}.jsonl"
        figures[file] = [json.loads(line) for line in path.read_text().splitlines()]
    figures["devices"] = sorted(recorder.devices)
    figures["syncs"] = recorder.steps[1:]  # before the first step, the model moves to the device
    return TrainedRun(figures, trainer.model, processor)


def train(recipe: str) -> dict[str, Any]:
    """Train the recipe of a file."""
    return train_recipe(load_recipe(recipe, [])).figures


def train_in_two_parts(recipe: str, interrupt_at: int) -> dict[str, Any]:
    """Train the recipe of a file, interrupted after some steps and then resumed."""
    loaded = load_recipe(recipe, [])
    try:
        train_recipe(loaded, interrupt_at=interrupt_at)
    except InterruptedRunError:
        return train_recipe(loaded).figures
    raise AssertionError("the run was not interrupted")
