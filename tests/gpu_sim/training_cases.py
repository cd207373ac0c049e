"""Cases that train: a recipe on the device of the process, with the numbers that tests look at."""

from __future__ import annotations

import collections
import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llavar_peft import Recipe, Trainer, build_model
from llavar_peft.recipe.presets import load_recipe


class SyncRecorder(TrainerCallback):  # type: ignore[misc]
    """Records where the host waited in each optimizer step, from the beginning of a step to that of the next one."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []
        self.device = ""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        from tests.gpu_sim.simulated_device import SYNCS

        self.device = str({str(one.device) for one in model.parameters()})
        self.steps.append(dict(SYNCS))
        SYNCS.clear()


def train(recipe: str) -> dict[str, Any]:
    """Train a recipe's file and return its figures."""
    return train_recipe(load_recipe(recipe, []))


def train_recipe(recipe: Recipe) -> dict[str, Any]:
    """Train a recipe and return its figures, stage by stage."""
    recorder, started = SyncRecorder(), time.perf_counter()
    model, processor = build_model(recipe.model, seed=recipe.seed)
    trainer = Trainer(model, processor, recipe, callbacks=[recorder])
    result = trainer.train()
    figures: dict[str, list[Any]] = collections.defaultdict(list)
    for stage in recipe.stages:
        for file in ("metrics", "probe"):
            path = Path(recipe.output_dir) / stage.name / f"{file}.jsonl"
            figures[file] += map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return {
        **figures,
        "result": str(result),
        "device": recorder.device,
        "syncs": recorder.steps[1:],
        "seconds": time.perf_counter() - started,
    }
