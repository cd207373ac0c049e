"""The state of a stage besides its weights: optimizer, schedule, loss scaler and random number generators.

With FSDP2 and ZeRO each rank writes its own shard of the optimizer's states into a safetensors file: gathered, they
would be the largest object of a run, 104 GB for 13B. The weights are gathered, so that a checkpoint is a usable model.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME
from transformers.training_args import ParallelMode

from llavar_peft.compat.dependency_internals import fp32_partitions
from llavar_peft.errors import EnvironmentFaultError, WeightsError
from llavar_peft.models.launch_environment import Sharding

_PARAMETER = "itself"
"""Key of the parameter itself among its states in a shard's file."""
_IMPLEMENTATION = ("fused", "foreach", "capturable")
"""Settings of an optimizer that depend on this run's device, not on that of the checkpoint."""


def save_training_state(trainer: transformers.Trainer, folder: Path, sharding: Sharding | None) -> None:
    """Write this rank's part of the training state into a checkpoint."""
    accelerator, optimizer = trainer.accelerator, trainer.optimizer
    folder.mkdir(parents=True, exist_ok=True)  # the rank that writes the weights may come later
    if sharding is not None:
        named, updating = _updated_tensors(trainer, sharding)
        # ZeRO's float32 partitions exist nowhere else.
        save_shard(named, updating, _shard_file(trainer, folder), weights=sharding == "zero")
    elif trainer.args.should_save:
        torch.save(optimizer.state_dict(), folder / OPTIMIZER_NAME)
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), folder / SCHEDULER_NAME)
        if accelerator.scaler is not None:
            torch.save(accelerator.scaler.state_dict(), folder / SCALER_NAME)
    _save_random_states(trainer.args, folder)


def load_training_state(trainer: transformers.Trainer, folder: Path, sharding: Sharding | None) -> None:
    """Load what ``save_training_state`` wrote; ``transformers.Trainer`` itself loads the random states.

    Raises:
        WeightsError: A shard's file belongs to another model or number of ranks.
    """
    accelerator, optimizer = trainer.accelerator, trainer.optimizer
    if sharding is not None:
        load_shard(*_updated_tensors(trainer, sharding), _shard_file(trainer, folder))
    else:
        # Through the CPU where a single GPU would have to hold the states twice.
        several = trainer.args.world_size > 1 and trainer.args.device.type != "cpu"
        device = trainer.args.device if several else "cpu"
        optimizer.load_state_dict(torch.load(folder / OPTIMIZER_NAME, map_location=device, weights_only=True))
    trainer.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
    if (folder / SCALER_NAME).is_file() and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(torch.load(folder / SCALER_NAME, weights_only=True))


def _save_random_states(args: transformers.TrainingArguments, folder: Path) -> None:
    """Write the random states in the form that ``transformers.Trainer`` loads after it has skipped the seen batches."""
    states: dict[str, Any] = {
        "python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()
    }  # fmt: skip
    if torch.cuda.is_available():
        distributed = args.parallel_mode == ParallelMode.DISTRIBUTED
        states["cuda"] = torch.cuda.get_rng_state_all() if distributed else torch.cuda.get_rng_state()
    suffix = f"_{args.process_index}" if args.world_size > 1 else ""
    torch.save(states, folder / f"rng_state{suffix}.pth")


def _shard_file(trainer: transformers.Trainer, folder: Path) -> Path:
    return folder / f"optimizer_{trainer.args.process_index}_of_{trainer.args.world_size}.safetensors"


def _updated_tensors(
    trainer: transformers.Trainer, sharding: Sharding
) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    """Return the tensors that this rank's optimizer updates, by name, and the plain optimizer."""
    optimizer: Any = trainer.optimizer.optimizer  # without accelerate's wrapper
    if sharding != "zero":
        return dict(trainer.model.named_parameters()), optimizer
    partitions = fp32_partitions(optimizer)
    if not partitions:
        raise EnvironmentFaultError.at(
            "DeepSpeed",
            "the optimizer states cannot be saved with this configuration",
            "use ZeRO 1 to 3, without offload to disk",
        )
    return {str(number): partition for number, partition in enumerate(partitions)}, optimizer.optimizer


def save_shard(named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, path: Path, *, weights: bool) -> None:
    """Write this rank's optimizer states of the named tensors; with ``weights``, write the tensors as well."""
    tensors, plain = dict[str, Tensor](), dict[str, Any]()
    for name, parameter in named.items():
        if weights:
            tensors[f"{name}|{_PARAMETER}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            (tensors if isinstance(value, Tensor) else plain)[f"{name}|{key}"] = value
    local = {entry: _local(tensor).detach().cpu().contiguous() for entry, tensor in tensors.items()}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    save_file(local, str(path), metadata={"states": json.dumps(plain), "groups": json.dumps(groups)})


def load_shard(named: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Load what ``save_shard`` wrote for the same named tensors on the same number of ranks, in place.

    Raises:
        WeightsError: The file does not hold the states of these tensors.
    """
    fused = any(group.get("fused") for group in optimizer.param_groups)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        for entry in file.keys():  # noqa: SIM118 - it is not a dictionary
            name, _, key = entry.rpartition("|")
            parameter, value = named.get(name), file.get_tensor(entry)
            if parameter is None or (value.ndim and value.shape != _local(parameter).shape):
                raise WeightsError.at(
                    f"{path}:{entry}", "belongs to another model or number of ranks", "start again with --restart"
                )
            if key == _PARAMETER:
                parameter.data.copy_(value)
            elif value.ndim:
                optimizer.state[parameter][key] = _distribute(value, parameter)
            else:
                # A fused optimizer reads its step number on the device, every other one on the CPU.
                optimizer.state[parameter][key] = value.to(parameter.device) if fused else value
    for entry, plain in json.loads(metadata.get("states", "{}")).items():
        name, _, key = entry.rpartition("|")
        optimizer.state[named[name]][key] = plain
    for group, saved in zip(optimizer.param_groups, json.loads(metadata.get("groups", "[]")), strict=True):
        group.update({key: value for key, value in saved.items() if key not in _IMPLEMENTATION})


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _distribute(local: Tensor, parameter: Tensor) -> Tensor:
    """Make a rank's part of a state a tensor that is sharded as its parameter is."""
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
