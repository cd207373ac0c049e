"""Sharding under ``accelerate launch``, by FSDP or DeepSpeed's ZeRO: set it up, check it, gather whole weights.

DeepSpeed takes the optimizer step inside ``backward``. A gradient that is not finite is therefore found after the step;
nothing of such a step is saved.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llavar_peft.compat.dependency_internals import enable_fsdp_on_cpu
from llavar_peft.errors import ConfigError, EnvironmentFaultError
from llavar_peft.recipe.schema import Lora, Tune

Sharding = Literal["fsdp1", "fsdp2", "zero"]
_GATHER_ON_SAVE = "stage3_gather_16bit_weights_on_model_save"


def is_fsdp_requested() -> bool:
    """Whether ``accelerate launch`` was configured to shard with FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_fsdp2() -> bool:
    """Whether version 2 of FSDP was requested."""
    return os.environ.get("FSDP_VERSION", "1") == "2"


def check_fsdp_version() -> None:
    """Reject FSDP version 1 on a CPU, where accelerate runs DDP silently or raises an error about devices.

    Raises:
        EnvironmentFaultError: FSDP version 1 was requested and there is no GPU.
    """
    if is_fsdp_requested() and not is_fsdp2() and not torch.accelerator.is_available():
        raise EnvironmentFaultError.at(
            "accelerate", "FSDP version 1 needs GPUs, and this machine has none", "set fsdp_version: 2"
        )


def configure_sharding(accelerator: Accelerator) -> Sharding | None:
    """Set up the sharding that ``accelerate launch`` was configured for, and return its kind.

    Raises:
        ConfigError: DeepSpeed's configuration sets the optimizer or the schedule.
        EnvironmentFaultError: FSDP was requested and accelerate does not run it.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _configure_zero(accelerator)
        return "zero"
    if not is_fsdp_requested() or accelerator.num_processes == 1:
        return None
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        enable_fsdp_on_cpu(accelerator)
    if accelerator.distributed_type != DistributedType.FSDP:
        raise EnvironmentFaultError.at(
            "accelerate",
            f"FSDP is not enabled (got {accelerator.distributed_type}, expected {DistributedType.FSDP})",
            "check the configuration given to accelerate launch",
        )
    return "fsdp2" if accelerator.is_fsdp2 else "fsdp1"


def _configure_zero(accelerator: Accelerator) -> None:
    plugin = accelerator.state.deepspeed_plugin
    settings: dict[str, Any] = plugin.deepspeed_config
    for name in ("optimizer", "scheduler"):
        if name in settings:
            raise ConfigError.at(
                f"deepspeed_config:{name}",
                "conflicts with the recipe, which sets it",
                f"remove {name!r} from the DeepSpeed configuration",
            )
    if plugin.zero_stage == 3:
        settings["zero_optimization"][_GATHER_ON_SAVE] = True


def reset_zero() -> None:
    """Forget ZeRO-3's settings: while transformers knows them, it partitions every model that is built."""
    if "deepspeed" in sys.modules:
        unset_hf_deepspeed_config()


def check_sharding(model: nn.Module) -> None:
    """Check that FSDP2 has sharded every trained parameter of a prepared model.

    Raises:
        EnvironmentFaultError: A trained parameter is not sharded.
    """
    unsharded = [name for name, one in model.named_parameters() if one.requires_grad and not isinstance(one, DTensor)]
    if unsharded:
        raise EnvironmentFaultError.at("FSDP", f"{unsharded[0]} is not sharded", "report this with the configuration")


def check_sharding_support(tune: Tune, stage: str) -> None:
    """Reject a stage that cannot be sharded before its first step.

    Raises:
        ConfigError: The stage uses PiSSA, which needs the whole base at each save.
    """
    if isinstance(tune, Lora) and tune.variant == "pissa":
        raise ConfigError.at(f"stages.{stage}.tune.variant", "pissa cannot be sharded", "use lora, or DDP")


def gather_weights(
    model: nn.Module, accelerator: Accelerator, sharding: Sharding | None, *, trained_only: bool
) -> dict[str, Tensor]:
    """Gather a wrapped model's state under the names of the plain model. Every rank must call this.

    Args:
        model: The wrapped model.
        accelerator: The accelerator of the run.
        sharding: How the model is sharded.
        trained_only: Whether frozen parameters of a sharded model are left out.

    Returns:
        Whole tensors. Those of a sharded model are on the CPU of the first rank; the other ranks get none.
    """
    if sharding is None:
        plain: dict[str, Tensor] = accelerator.unwrap_model(model).state_dict()
        return plain
    if sharding == "zero":
        if trained_only:
            return _gather_trained(model, accelerator)
        return accelerator.get_state_dict(model) or {}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    state = get_model_state_dict(model, options=options)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _gather_trained(model: nn.Module, accelerator: Accelerator) -> dict[str, Tensor]:
    import deepspeed

    state = {}
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        if parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter]):
                if accelerator.is_main_process:
                    state[name] = parameter.detach().cpu().clone()
    return state
