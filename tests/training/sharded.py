"""The script of each rank in ``test_sharding.py``: trains every recipe of a folder in one process group."""

from __future__ import annotations

import dataclasses
import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from llavar_peft import Recipe, Trainer, build_model
from llavar_peft.errors import InterruptedRunError
from llavar_peft.recipe.presets import load_recipe
from llavar_peft.training import stage_trainer

TIME_LIMIT = 480
"""Seconds after which a rank that waits for another one prints where and stops."""


@dataclasses.dataclass
class Seen:
    """What a rank saw of a run.

    Attributes:
        trained: For each step, the numbers of this rank's and of all trained parameters.
        frozen: The same for frozen parameters.
        gradients: For each forward pass, the number of trained tensors that already have a gradient: before the first
            pass of a step none, afterwards all, and those of FSDP as shards.
        losses: For each forward pass, the sum of the loss.
        timeout: The process group's time limit in seconds.
    """

    trained: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    frozen: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    gradients: list[int] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    timeout: float | None = None


class ShardCounter(TrainerCallback):  # type: ignore[misc]
    """Records what this rank holds, and sends a signal at a step."""

    def __init__(self, signal_at: int | None) -> None:
        self.signal_at = signal_at
        self.seen = Seen()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for trained, found in ((True, self.seen.trained), (False, self.seen.frozen)):
            chosen = [each for each in model.parameters() if each.requires_grad == trained]
            found.append(
                (sum(map(_shard_size, chosen)), sum(getattr(each, "ds_numel", each.numel()) for each in chosen))
            )
        if torch.distributed.is_initialized():
            # No public function returns a group's time limit.
            group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
            self.seen.timeout = group.options._timeout.total_seconds()
        if state.global_step == self.signal_at:
            self.signal_at = None
            os.kill(os.getpid(), signal.SIGTERM)

    def watch_passes(self) -> None:
        """Record the gradients before each forward pass, and its loss."""
        plain = stage_trainer.supervised_loss

        def watched(model: Any, inputs: Any) -> Any:
            gradients = [each.grad for each in model.parameters() if each.requires_grad and each.grad is not None]
            self.seen.gradients.append(sum(isinstance(each, DTensor) for each in gradients))
            result = plain(model, inputs)
            self.seen.losses.append(float(result[0].detach()))
            return result

        stage_trainer.supervised_loss = watched


def _shard_size(parameter: Any) -> int:
    """Return the size of this rank's shard of a parameter, even while ZeRO-3 has gathered the parameter."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    return parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel()


def run(recipe: Recipe, counter: ShardCounter) -> None:
    """Train, and resume once after an interruption."""
    plain = stage_trainer.supervised_loss
    counter.watch_passes()
    try:
        for _ in range(2):
            model, processor = build_model(recipe.model, seed=recipe.seed)
            try:
                Trainer(model, processor, recipe, callbacks=[counter]).train()
            except InterruptedRunError:
                continue
            return
    finally:
        stage_trainer.supervised_loss = plain


def main() -> None:
    folder, rank = Path(sys.argv[1]), os.environ.get("RANK", "0")
    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed

        # Compiling DeepSpeed's collectives over shared memory takes two minutes; gloo's give the same result.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for path in sorted(folder.glob("*.yaml")):
        counter = ShardCounter(2 if path.stem.startswith("resumed") else None)
        run(load_recipe(str(path), []), counter)
        (folder / f"{path.stem}.{rank}.json").write_text(json.dumps(dataclasses.asdict(counter.seen)))


if __name__ == "__main__":
    main()
