"""The script of each rank in ``test_sharding.py``: trains every recipe of a folder in one process group.

The first word of a recipe's name says how: ``resumed``, ``zero1`` and ``zero2`` are interrupted and resumed, the latter
with another stage of ZeRO; ``both`` runs take place twice, with models that are loaded as a whole and with models of
which each rank reads its shards, into ``OUTPUT-by-shard``; ``refused`` ones must end with an error; of ``memory`` ones
the main memory is measured; all others run.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from llavar_peft import ModelConfig, Recipe, Trainer, build_model
from llavar_peft.errors import InterruptedRunError
from llavar_peft.recipe.presets import load_recipe
from llavar_peft.training import stage_trainer, trainer
from llavar_peft.training.launch import start_processes
from llavar_peft.training.read_shards import build_for_training

TIME_LIMIT = 1500
"""Seconds after which a rank that waits for another one prints where and stops."""


@dataclasses.dataclass
class Seen:
    """What a rank saw of a run.

    Attributes:
        trained: For each step, the numbers of this rank's and of all trained parameters. The first step of a stage is
            left out: generation before it leaves the root's shards gathered until the first backward pass.
        frozen: The same for frozen parameters.
        gradients: For each forward pass, the number of trained tensors that already have a gradient: before the first
            pass of a step none, afterwards all, and those of FSDP as shards.
        losses: For each forward pass, the sum of the loss.
        steps: Number of steps.
        timeout: The process group's time limit in seconds.
        interrupted: Whether the run was interrupted and resumed.
        error: Type and message of the error that ended the run.
        memory: Bytes of main memory, apart from mapped files, that the run needed at most before its first pass.
    """

    trained: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    frozen: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    gradients: list[int] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    steps: int = 0
    timeout: float | None = None
    interrupted: bool = False
    error: tuple[str, str] | None = None
    memory: int = 0


class ShardCounter(TrainerCallback):  # type: ignore[misc]
    """Records what this rank holds, and sends a signal at a step.

    Args:
        signal_at: Number of steps after which the run gets the signal, to stop after the next one.
    """

    def __init__(self, signal_at: int | None = None) -> None:
        self.signal_at = signal_at
        self.seen = Seen()
        self._first = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first = True

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if torch.distributed.is_initialized():
            # No public function returns a group's time limit.
            group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
            self.seen.timeout = group.options._timeout.total_seconds()
        if state.global_step == self.signal_at:
            self.signal_at = None
            os.kill(os.getpid(), signal.SIGTERM)
        self.seen.steps += 1
        if self._first:
            self._first = False
            return
        if os.environ.get("ACCELERATE_USE_FSDP"):
            # Each trained parameter once, also those of which this rank has no part.
            updated = [each for group in kwargs["optimizer"].param_groups for each in group["params"]]
            assert {*updated} == {each for each in model.parameters() if each.requires_grad}
            assert len({*updated}) == len(updated)
        for trained, found in ((True, self.seen.trained), (False, self.seen.frozen)):
            chosen = [each for each in model.parameters() if each.requires_grad == trained]
            found.append(
                (sum(map(_shard_size, chosen)), sum(getattr(each, "ds_numel", each.numel()) for each in chosen))
            )

    def watch_passes(self) -> AbstractContextManager[object]:
        """Record the gradients before each forward pass, and its loss."""
        plain = stage_trainer.supervised_loss

        def watched(model: Any, inputs: Any) -> Any:
            gradients = [each.grad for each in model.parameters() if each.requires_grad and each.grad is not None]
            self.seen.gradients.append(sum(isinstance(each, DTensor) for each in gradients))
            result = plain(model, inputs)
            self.seen.losses.append(float(result[0].detach()))
            return result

        return patch.object(stage_trainer, "supervised_loss", watched)


def _shard_size(parameter: Any) -> int:
    """Return the size of this rank's shard of a parameter, even while ZeRO-3 has gathered the parameter."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().numel()
    return parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel()


def run(recipe: Recipe, counter: ShardCounter) -> None:
    """Train, and resume once after an interruption."""
    _train(recipe, counter, lambda: build_model(recipe.model, seed=recipe.seed))


def _train(recipe: Recipe, counter: ShardCounter, build: Callable[[], Any]) -> None:
    for _ in range(2):
        model, processor = build()
        try:
            Trainer(model, processor, recipe, callbacks=[counter]).train()
        except InterruptedRunError:
            counter.seen.interrupted = True
            continue
        return


def _build_at_once(config: ModelConfig, processes: PartialState, *, seed: int) -> Any:
    return build_model(config, seed=seed)


def _build_pending(config: ModelConfig, processes: PartialState, *, seed: int) -> Any:
    model, processor = build_for_training(config, processes, seed=seed)
    if not any(each.is_meta for each in model.parameters()):
        raise AssertionError("this rank has loaded the whole model")
    return model, processor


def run_both(recipe: Recipe, counter: ShardCounter) -> None:
    """Train models that are loaded as a whole, and models of which each rank reads its shards; resume the latter."""
    second = dataclasses.replace(recipe, output_dir=f"{recipe.output_dir}-by-shard")
    processes = start_processes(recipe)
    signal_at, counter.signal_at = counter.signal_at, None
    for each, build in ((recipe, _build_at_once), (second, _build_pending)):
        with patch.object(trainer, "build_for_training", build):  # for the second stage
            _train(each, counter, partial(build, each.model, processes, seed=each.seed))
        counter.signal_at = signal_at


def refuse(recipe: Recipe, counter: ShardCounter) -> None:
    """Train as ``llavar-peft train`` does, and record the error that ends the run."""
    try:
        trainer.run_recipe(recipe)
    except Exception as error:  # noqa: BLE001 - the test says which it has to be
        counter.seen.error = type(error).__name__, str(error)


def measure_memory(recipe: Recipe, counter: ShardCounter) -> None:
    """Train as ``llavar-peft train`` does, and record the memory that it takes to load the model."""
    status, plain, started = Path("/proc/self/status"), stage_trainer.supervised_loss, threading.Event()

    def anonymous() -> int:
        lines = status.read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    def sample() -> None:
        while not started.wait(0.005):
            counter.seen.memory = max(counter.seen.memory, anonymous() - before)

    def first(model: Any, inputs: Any) -> Any:
        if not started.is_set():
            counter.seen.memory = max(counter.seen.memory, anonymous() - before)
        started.set()
        return plain(model, inputs)

    before, sampler = anonymous(), threading.Thread(target=sample, daemon=True)
    sampler.start()
    with patch.object(stage_trainer, "supervised_loss", first):
        trainer.run_recipe(recipe)


WAYS = {"both": run_both, "refused": refuse, "memory": measure_memory}
_INTERRUPTED = ("both", "resumed", "zero1", "zero2")


def main(folder: Path) -> None:
    """Train the recipes of a folder, one after the other."""
    gc.freeze()  # each stage collects garbage twice
    rank = os.environ.get("RANK", "0")
    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed

        # Compiling DeepSpeed's collectives over shared memory takes two minutes; gloo's give the same result.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for path in sorted(folder.glob("*.yaml")):
        way, _, _ = path.stem.partition("-")
        stage = {"ACCELERATE_DEEPSPEED_ZERO_STAGE": way[-1]} if way.startswith("zero") else {}
        counter = ShardCounter(2 if way in _INTERRUPTED else None)
        with patch.dict(os.environ, stage), counter.watch_passes():
            WAYS.get(way, run)(load_recipe(str(path), []), counter)
        (folder / f"{path.stem}.{rank}.json").write_text(json.dumps(dataclasses.asdict(counter.seen)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
