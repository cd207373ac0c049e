"""The script of each rank in ``test_read_shards.py``: trains a folder's recipes with both ways to load models."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from accelerate import PartialState

from llavar_peft import ModelConfig, Recipe, Trainer, build_model
from llavar_peft.errors import InterruptedRunError
from llavar_peft.recipe.presets import load_recipe
from llavar_peft.training import trainer
from llavar_peft.training.launch import start_processes
from llavar_peft.training.read_shards import build_for_training
from tests.training.sharded import ShardCounter


class EachParameterOnce(ShardCounter):
    """Checks that the optimizer has each trained parameter once, also those of which this rank has no part."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        super().on_step_begin(args, state, control, model=model, **kwargs)
        updated = [each for group in kwargs["optimizer"].param_groups for each in group["params"]]
        if "ACCELERATE_USE_FSDP" in os.environ:
            assert {*updated} == {each for each in model.parameters() if each.requires_grad}
            assert len({*updated}) == len(updated)


def _build_at_once(config: ModelConfig, processes: PartialState, *, seed: int) -> Any:
    return build_model(config, seed=seed)


def _train(recipe: Recipe, build: Any, counter: ShardCounter) -> None:
    processes = start_processes(recipe)
    with patch.object(trainer, "build_for_training", build):  # for the second stage
        for _ in range(2):
            model, processor = build(recipe.model, processes, seed=recipe.seed)
            if build is build_for_training and not any(each.is_meta for each in model.parameters()):
                raise AssertionError("this rank has loaded the whole model")
            try:
                Trainer(model, processor, recipe, callbacks=[counter]).train()
            except InterruptedRunError:
                continue
            return


def main() -> None:
    folder = Path(sys.argv[1])
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed

        # Compiling DeepSpeed's collectives over shared memory takes two minutes; gloo's give the same result.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for path in sorted(folder.glob("*.yaml")):
        recipe = load_recipe(str(path), [])
        for name, build in (("at_once", _build_at_once), ("by_shard", build_for_training)):
            # Only the second way is interrupted, and resumes.
            counter = EachParameterOnce(2 if build is build_for_training else None)
            _train(dataclasses.replace(recipe, output_dir=str(folder / name / path.stem)), build, counter)


if __name__ == "__main__":
    main()
