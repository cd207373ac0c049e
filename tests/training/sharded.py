"""The script of each rank in ``test_sharding.py``: trains every recipe of a folder in one process group.

A stage of four steps or more is interrupted and resumed. The first word of a recipe's name says how it is trained: in
``shard`` runs each rank reads its shards of the model; ``both`` runs take place twice, with models that are loaded as a
whole and with models of which each rank reads its shards, into ``OUTPUT-by-shard``; ``zero1`` and ``zero2`` have
another stage of ZeRO, and ``offload2`` and ``offload3`` keep in main memory what that stage can; ``refused`` ones must
end with an error; of ``memory`` ones the main memory is measured; all others load models as a whole.
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import gc
import importlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import ParallelismConfig, PartialState
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from llavar_peft import ModelConfig, Recipe, Trainer, build_model
from llavar_peft.errors import InterruptedRunError
from llavar_peft.models import build_model as building
from llavar_peft.models import layer_kernels
from llavar_peft.recipe.presets import load_recipe
from llavar_peft.training import stage_trainer, trainer
from llavar_peft.training.launch import start_processes
from llavar_peft.training.read_shards import build_for_training
from tests.models.test_layer_kernels import compile_without_code, import_as_liger

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
    """Train models of which each rank reads its shards, and resume once; then models that are loaded as a whole."""
    run_by_shard(dataclasses.replace(recipe, output_dir=f"{recipe.output_dir}-by-shard"), counter)
    counter.signal_at = None
    _run_built_by(_build_at_once, recipe, counter)


def run_by_shard(recipe: Recipe, counter: ShardCounter) -> None:
    """Train models of which each rank reads its shards."""
    _run_built_by(_build_pending, recipe, counter)


def _run_built_by(build: Callable[..., Any], recipe: Recipe, counter: ShardCounter) -> None:
    processes = start_processes(recipe)
    with patch.object(trainer, "build_for_training", build):  # for the second stage
        _train(recipe, counter, partial(build, recipe.model, processes, seed=recipe.seed))


def refuse(recipe: Recipe, counter: ShardCounter) -> None:
    """Train as ``llavar-peft train`` does, and record the error that ends the run."""
    try:
        trainer.run_recipe(recipe)
    except Exception as error:  # noqa: BLE001 - the test says which it has to be
        counter.seen.error = type(error).__name__, str(error)


def measure_memory(recipe: Recipe, counter: ShardCounter) -> None:
    """Train as ``llavar-peft train`` does, and record the memory that it takes to load the model."""
    importlib.import_module("torch._inductor.compile_fx")  # which DeepSpeed imports at its first step
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

    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)  # memory that earlier runs have freed would not be counted again
    libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD: what is freed returns to the system
    before, sampler = anonymous(), threading.Thread(target=sample, daemon=True)
    sampler.start()
    with patch.object(stage_trainer, "supervised_loss", first):
        trainer.run_recipe(recipe)


WAYS = {"both": run_both, "shard": run_by_shard, "refused": refuse, "memory": measure_memory}
_UNINTERRUPTED = 3
"""Steps of the longest stage that is not interrupted."""
_ZERO = "ACCELERATE_DEEPSPEED_"


def _zero_variables(way: str) -> dict[str, str]:
    """Return the variables that a configuration of ZeRO gives its processes, where they differ from the example's."""
    if not way.startswith(("zero", "offload")):
        return {}
    kept = {"offload2": ("OPTIMIZER",), "offload3": ("OPTIMIZER", "PARAM")}.get(way, ())
    return {f"{_ZERO}ZERO_STAGE": way[-1], **{f"{_ZERO}OFFLOAD_{name}_DEVICE": "cpu" for name in kept}}


@contextmanager
def _stand_ins(kernels: str) -> Iterator[None]:
    """Put PyTorch's definitions in the place of code that a GPU has or that takes minutes to compile.

    These are Liger's kernels, what ``torch.compile`` makes of its graphs, and DeepSpeed's AdamW for the CPU.
    """
    plain = stage_trainer.configure_sharding

    def configure(accelerator: Any, **settings: Any) -> Any:
        found = plain(accelerator, **settings)
        if found == "zero":
            accelerator.state.deepspeed_plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
        return found

    with pytest.MonkeyPatch.context() as replaced:
        replaced.setattr(stage_trainer, "configure_sharding", configure)
        if kernels == "liger":
            import_as_liger(replaced)
            for module in (building, layer_kernels):
                replaced.setattr(module, "check_kernels", lambda *_: None)  # it asks for a GPU
        graphs = compile_without_code(replaced) if kernels == "compile" else None
        with patch("transformers.integrations.deepspeed.initialize_weights_zero3") as partitioned:
            yield
        # A model that is built while ZeRO-3's settings are known is a whole one, and all ranks fill and exchange it.
        partitioned.assert_not_called()
        if graphs == []:
            raise AssertionError("nothing was compiled")


def main(folder: Path) -> None:
    """Train the recipes of a folder, one after the other."""
    gc.freeze()  # each stage collects garbage twice
    rank = os.environ.get("RANK", "0")
    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        import deepspeed

        # Compiling DeepSpeed's collectives over shared memory takes two minutes; gloo's give the same result.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Of memory first, before other runs leave gaps in it.
    for path in sorted(folder.glob("*.yaml"), key=lambda path: (not path.stem.startswith("memory"), path.stem)):
        way, _, _ = path.stem.partition("-")
        recipe = load_recipe(str(path), [])
        counter = ShardCounter(2 if any((stage.max_steps or 0) > _UNINTERRUPTED for stage in recipe.stages) else None)
        with patch.dict(os.environ, _zero_variables(way)), counter.watch_passes(), _stand_ins(recipe.model.kernels):
            WAYS.get(way, run)(recipe, counter)
        (folder / f"{path.stem}.{rank}.json").write_text(json.dumps(dataclasses.asdict(counter.seen)))


def main_in_groups(folder: Path) -> None:
    """Train as ``main`` does, in groups that each hold the whole model.

    accelerate's check is left out: it knows FSDP on CPUs only after it has been enabled there.
    """
    with patch.object(ParallelismConfig, "_validate_accelerator", lambda *_: None):
        main(folder)
