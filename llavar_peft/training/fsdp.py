"""FSDP2 under ``accelerate launch``: whether it is real, whole weights out of shards, and shards' optimizer states.

Each rank writes its own shard of the optimizer's states: gathered they would be the largest thing of a run, 104 GB for
13B. The weights are gathered, since a checkpoint is a model that can be asked.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from llavar_peft.errors import ConfigError, EnvironmentFaultError, WeightsError
from llavar_peft.recipe.schema import Lora, Tune

_ITSELF = "itself"


def asked_for_sharding() -> bool:
    """Whether ``accelerate launch`` was told to shard by FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def check_fsdp_version() -> None:
    """Look at what ``accelerate launch`` was told, before accelerate does.

    Raises:
        EnvironmentFaultError: FSDP's first version on a CPU: depending on its other settings accelerate runs DDP there
            without a word, or raises an error about devices.
    """
    if asked_for_sharding() and os.environ.get("FSDP_VERSION", "1") != "2" and not torch.accelerator.is_available():
        raise EnvironmentFaultError.at(
            "accelerate", "FSDP's first version needs GPUs, and cannot shard here", "set fsdp_version: 2"
        )


def enable_sharding(accelerator: Accelerator) -> int:
    """See to it that a run that is to be sharded is; accelerate runs plain DDP without a word where there is no GPU.

    Args:
        accelerator: Just made.

    Returns:
        The version of FSDP that will shard the model; 0 is none.

    Raises:
        EnvironmentFaultError: It cannot be, for a reason that accelerate has.
    """
    if not asked_for_sharding() or accelerator.num_processes == 1:
        return 0
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # In both: whoever looks at accelerate's state again takes the process's over into it.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    if accelerator.distributed_type != DistributedType.FSDP:
        raise EnvironmentFaultError.at(
            "accelerate",
            f"was asked for FSDP and would run {accelerator.distributed_type}",
            "look at the configuration given to accelerate launch",
        )
    return int(accelerator.state.fsdp_plugin.fsdp_version)


def check_sharding(model: nn.Module) -> None:
    """Look whether the trained parameters are shards, after the model was prepared.

    Args:
        model: Prepared.

    Raises:
        EnvironmentFaultError: One is not.
    """
    whole = [name for name, each in model.named_parameters() if each.requires_grad and not isinstance(each, DTensor)]
    if whole:
        raise EnvironmentFaultError.at("FSDP", f"{whole[0]} is not sharded", "report this, with the configuration")


def check_sharding_support(tune: Tune, stage: str) -> None:
    """Say before the first step what FSDP does not go with.

    Args:
        tune: What the stage trains.
        stage: Its name.

    Raises:
        ConfigError: PiSSA, whose adapter is told from the whole base at each save.
    """
    if isinstance(tune, Lora) and tune.variant == "pissa":
        raise ConfigError.at(f"stages.{stage}.tune.variant", "pissa does not go with FSDP", "use lora, or DDP")


def gathered_state(model: nn.Module, *, trained_only: bool) -> dict[str, Tensor]:
    """The model's state out of its shards. Every rank has to ask.

    Args:
        model: Sharded.
        trained_only: Whether frozen parameters are left out.

    Returns:
        Whole tensors on the CPU of the first rank; nothing on the others.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    state = get_model_state_dict(model, options=options)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def save_states(named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, path: Path, *, weights: bool) -> None:
    """Write this rank's optimizer states.

    Args:
        named: What the optimizer steps, with names that are the same when the run goes on.
        optimizer: Over these.
        path: This rank's file.
        weights: Whether the tensors themselves are written too: of masters nothing else has all the digits.
    """
    tensors, plain = dict[str, Tensor](), dict[str, Any]()
    for name, parameter in named.items():
        if weights:
            tensors[f"{name}|{_ITSELF}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            (tensors if isinstance(value, Tensor) else plain)[f"{name}|{key}"] = value
    whole = {entry: _local(tensor).detach().cpu().contiguous() for entry, tensor in tensors.items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    path.parent.mkdir(parents=True, exist_ok=True)  # the rank that writes the weights may come later
    save_file(whole, str(path), metadata={"states": json.dumps(plain), "groups": json.dumps(groups)})


def load_states(named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Take up what ``save_states`` wrote.

    Args:
        named: As it was then, on as many ranks.
        optimizer: Over these.
        path: This rank's file.

    Raises:
        WeightsError: It does not hold the states of these shards.
    """
    with safe_open(path, framework="pt") as file:
        told = file.metadata() or {}
        for entry in file.keys():  # noqa: SIM118 - it is no dictionary
            name, _, key = entry.rpartition("|")
            parameter, value = named.get(name), file.get_tensor(entry)
            if parameter is None or (value.ndim and value.shape != _local(parameter).shape):
                raise WeightsError.at(
                    f"{path}:{entry}", "is of another model or number of ranks", "begin with --restart"
                )
            if key == _ITSELF:
                parameter.data.copy_(value)
            else:
                optimizer.state[parameter][key] = _like(value, parameter) if value.ndim else value
    for entry, plain in json.loads(told.get("states", "{}")).items():
        name, _, key = entry.rpartition("|")
        optimizer.state[named[name]][key] = plain
    for group, saved in zip(optimizer.param_groups, json.loads(told.get("groups", "[]")), strict=True):
        group.update(saved)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _like(local: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return local.to(parameter.device)
    return DTensor.from_local(
        local.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
