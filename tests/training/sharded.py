"""What each rank of ``test_sharding.py`` does: every recipe of a folder, one after the other in one process group."""

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


class Look(TrainerCallback):  # type: ignore[misc]
    """Counts what this rank holds; in the middle of a run it may get a signal."""

    def __init__(self, signal_at: int | None) -> None:
        self.signal_at = signal_at
        self.shards: list[tuple[int, int]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        trained = [each for each in model.parameters() if each.requires_grad]
        self.shards.append((sum(map(_here, trained)), sum(getattr(each, "ds_numel", each.numel()) for each in trained)))
        if state.global_step == self.signal_at:
            self.signal_at = None
            os.kill(os.getpid(), signal.SIGTERM)


def _here(parameter: Any) -> int:
    """How many numbers of it this rank holds; of a ZeRO-3 parameter what is gathered at the time is another matter."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    return parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel()


def run(recipe: Recipe, look: Look) -> None:
    """Train, and goes on once if it was interrupted."""
    for _ in range(2):
        model, processor = build_model(recipe.model, seed=recipe.seed)
        try:
            Trainer(model, processor, recipe, callbacks=[look]).train()
        except InterruptedRunError:
            continue
        return


def main() -> None:
    folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed

        # Its collectives by shared memory are compiled at first use, for two minutes; gloo's come to the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for path in sorted(folder.glob("*.yaml")):
        look = Look(2 if path.stem.startswith("resumed") else None)
        run(load_recipe(str(path), []), look)
        (folder / f"{path.stem}.{rank}.json").write_text(json.dumps(look.shards))


if __name__ == "__main__":
    main()
