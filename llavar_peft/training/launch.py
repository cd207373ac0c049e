"""The start of a run's processes: check that the recipe fits the launch, then create the process group.

Both happen before the model is loaded, so that each process loads it onto its own device, and a combination that is not
supported costs no time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import timedelta
from functools import cache

import torch
from accelerate import PartialState

from llavar_peft.errors import ConfigError, Fault
from llavar_peft.models.build_model import resolve_dtype
from llavar_peft.models.launch_environment import (
    Sharding,
    claim_device,
    describe_half_precision,
    half_precision,
    requested_sharding,
    uses_accelerator,
    uses_gpu,
)
from llavar_peft.recipe.schema import Lora, Precision, Recipe, Stage

logger = logging.getLogger(__name__)


def start_processes(recipe: Recipe) -> PartialState:
    """Check the launch, set this process's device, and create the process group unless it exists.

    Args:
        recipe: The run. Its ``process_timeout`` applies to a new process group.

    Raises:
        ConfigError: A stage cannot be trained with the requested sharding.
        EnvironmentFaultError: There are more processes than GPUs, or FSDP version 1 was requested.
    """
    check_launch(recipe)
    claim_device()
    state = PartialState(cpu=uses_cpu(), timeout=timedelta(seconds=recipe.process_timeout))
    if uses_gpu() and state.num_processes == 1:
        _report_unused_gpus(torch.cuda.device_count())
    _report_precision()
    if not uses_accelerator():
        _report_slow(", ".join(_slow_settings(recipe)))
    return state


def uses_cpu() -> bool:
    """Whether accelerate has to be told to use the CPU: otherwise it treats several processes without GPUs as one."""
    return not uses_accelerator()


def check_launch(recipe: Recipe) -> None:
    """Reject stages that cannot be trained with the sharding that ``accelerate launch`` was configured for.

    Raises:
        ConfigError: A stage cannot; the message lists all of them.
        EnvironmentFaultError: FSDP version 1 was requested.
    """
    sharding = requested_sharding()
    if sharding is None:
        return
    faults = [fault for stage in recipe.stages for fault in _sharding_faults(recipe, stage, sharding)]
    if faults:
        raise ConfigError.listing("recipe", faults) if len(faults) > 1 else ConfigError(str(faults[0]), faults)


def _sharding_faults(recipe: Recipe, stage: Stage, sharding: Sharding) -> Iterator[Fault]:
    where = f"stages.{stage.name}"
    if isinstance(stage.tune, Lora) and stage.tune.variant == "pissa":
        yield Fault(f"{where}.tune.variant", "pissa cannot be sharded", "use lora, or DDP")
    if stage.optim.optimizer != "adamw":
        # Its states are blocks of 8-bit numbers of a whole tensor: bitsandbytes has no kernels for FSDP's shards, and
        # in ZeRO's flat partitions small tensors would lose the 32-bit states that bitsandbytes gives them.
        engine = "FSDP" if sharding == "fsdp2" else "ZeRO"
        what = f"{engine} cannot shard the states of {stage.optim.optimizer}"
        yield Fault(f"{where}.optim.optimizer", what, f"use adamw, whose states {engine} shards, or DDP")
    if sharding != "fsdp2":
        return
    if recipe.model.quantize == "int8":
        # bitsandbytes keeps the scales and the weights outside the parameters.
        yield Fault("model.quantize", "FSDP cannot shard int8 weights", "use nf4, or DDP")
    if recipe.model.quantize == "nf4":
        weights = resolve_dtype(recipe.model.dtype)
        computed = compute_dtype(stage.precision) or weights
        if weights != computed:
            # FSDP casts parameters to the computation's format, which would destroy 4-bit numbers stored in another.
            got, expected = (str(dtype).removeprefix("torch.") for dtype in (weights, computed))
            what = f"FSDP needs nf4 weights in the format of the computation (got {got}, expected {expected})"
            yield Fault("model.dtype", what, f"set model.dtype: {expected}, or {where}.precision")


def compute_dtype(precision: Precision) -> torch.dtype | None:
    """Return the 16-bit dtype of the computation, None for float32; ``auto`` is the one that suits the GPU."""
    chosen = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
    return half_precision() if precision == "auto" else chosen[precision]


@cache
def _report_unused_gpus(seen: int) -> None:
    if seen > 1:
        logger.warning(
            "this process sees %d GPUs and uses one of them, cuda:0; to use all of them, start it with "
            "accelerate launch --multi_gpu --num_processes %d",
            seen, seen,
        )  # fmt: skip


@cache
def _report_precision() -> None:
    if reason := describe_half_precision():
        logger.warning("%s", reason)


def _slow_settings(recipe: Recipe) -> Iterator[str]:
    for number, stage in enumerate(recipe.stages):
        if stage.precision in ("bf16", "fp16"):
            yield f"stages.{number}.precision={stage.precision}"
    if recipe.model.dtype in ("bfloat16", "float16"):
        yield f"model.dtype={recipe.model.dtype}"


@cache
def _report_slow(settings: str) -> None:
    if settings:
        logger.warning(
            "%s: a CPU computes in 16 bits more slowly than in 32, and without instructions for it many times more "
            "slowly (minutes for each step); use 'auto' instead, which is float32 on a CPU",
            settings,
        )
