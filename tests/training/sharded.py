"""The script of each rank in ``test_sharding.py``: trains every recipe of a folder in one process group."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from llavar_peft import Recipe, Trainer, build_model
from llavar_peft.errors import InterruptedRunError
from llavar_peft.recipe.presets import load_recipe


class ShardCounter(TrainerCallback):  # type: ignore[misc]
    """Counts the numbers that this rank holds, and sends a signal at a step."""

    def __init__(self, signal_at: int | None) -> None:
        self.signal_at = signal_at
        self.shards: list[tuple[int, int]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        trained = [each for each in model.parameters() if each.requires_grad]
        self.shards.append(
            (sum(map(_shard_size, trained)), sum(getattr(each, "ds_numel", each.numel()) for each in trained))
        )
        if state.global_step == self.signal_at:
            self.signal_at = None
            os.kill(os.getpid(), signal.SIGTERM)


def _shard_size(parameter: Any) -> int:
    """Return the size of this rank's shard of a parameter, even while ZeRO-3 has gathered the parameter."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    return parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel()


def run(recipe: Recipe, counter: ShardCounter) -> None:
    """Train, and resume once after an interruption."""
    for _ in range(2):
        model, processor = build_model(recipe.model, seed=recipe.seed)
        try:
            Trainer(model, processor, recipe, callbacks=[counter]).train()
        except InterruptedRunError:
            continue
        return


def main() -> None:
    folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed

        # Compiling DeepSpeed's collectives over shared memory takes two minutes; gloo's give the same result.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for path in sorted(folder.glob("*.yaml")):
        counter = ShardCounter(2 if path.stem.startswith("resumed") else None)
        run(load_recipe(str(path), []), counter)
        (folder / f"{path.stem}.{rank}.json").write_text(json.dumps(counter.shards))


if __name__ == "__main__":
    main()
