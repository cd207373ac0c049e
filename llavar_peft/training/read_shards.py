"""Shard a model whose values are still pending, and read each rank's shards from the files.

No rank holds more than its shards and a block of a tensor. The ranks of a node read the same files, which the operating
system caches once.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from llavar_peft.errors import EnvironmentFaultError
from llavar_peft.models.build_model import build_model, build_pending_model
from llavar_peft.models.launch_environment import Sharding, requested_sharding
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.pending_weights import PendingWeights
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.recipe.schema import ModelConfig

_WRAPS_BEFORE = {"FSDP_ACTIVATION_CHECKPOINTING": ("true", "1"), "ACCELERATE_DYNAMO_BACKEND": ("inductor", "eager")}
"""Settings of accelerate with which it changes the modules of a whole model before it shards it."""


def build_for_training(
    config: ModelConfig, processes: PartialState, *, seed: int
) -> tuple[LlavarForConditionalGeneration, LlavarProcessor]:
    """Build a model with as little host memory as this run's kind of distribution allows.

    Args:
        config: The model.
        processes: The processes of the run.
        seed: As in ``build_model``.

    Returns:
        What ``build_model`` returns. The model is on the GPU, if there is one; its weights are pending if they will be
        sharded.
    """
    sharding = requested_sharding()
    wrapped_before = any(os.environ.get(name, "").lower() in values for name, values in _WRAPS_BEFORE.items())
    sharded = sharding == "zero" or (sharding == "fsdp2" and not wrapped_before)
    gpu = processes.device.type == "cuda" and sharding is None
    if config.quantize is not None or not (sharded or gpu):
        return build_model(config, seed=seed)
    model, processor = build_pending_model(config, seed=seed)
    if not sharded and model.pending_weights is not None:
        model.pending_weights.fill(model, processes.device)
        model.pending_weights = None
    return model, processor


def shard_pending(model: Any, accelerator: Accelerator, sharding: Sharding) -> None:
    """Shard a model whose values are pending, as accelerate would shard a whole one, and read the shards, in place.

    Args:
        model: The tuned model.
        accelerator: The accelerator of the run.
        sharding: How the model is sharded.

    Raises:
        EnvironmentFaultError: A parameter has no values.
    """
    pending: PendingWeights = model.pending_weights
    if sharding == "fsdp2":
        _shard(model, pending, accelerator)
    elif accelerator.state.deepspeed_plugin.zero_stage == 3:
        _partition(model, pending, accelerator)
    else:
        pending.fill(model, accelerator.device)
    plain = model.get_base_model() if hasattr(model, "peft_config") else model
    plain.pending_weights = None
    _check_filled(model)


def _partition(model: nn.Module, pending: PendingWeights, accelerator: Accelerator) -> None:
    """Partition a model as ZeRO-3 does, one tensor after the other."""
    import deepspeed

    # On CPUs accelerate does it later, and zero.Init would count one process.
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    settings = accelerator.state.deepspeed_plugin.hf_ds_config
    dtype = settings.dtype()
    partitioned: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter in partitioned:  # tied embeddings are one parameter in two places
                setattr(module, name, partitioned[parameter])
                continue
            whole = pending.load(parameter, accelerator.device) if parameter in pending else parameter
            # DeepSpeed computes in one dtype, and keeps float32 copies of what is trained.
            converted = nn.Parameter(whole.detach().to(accelerator.device, dtype), requires_grad=whole.requires_grad)
            setattr(module, name, converted)
            partitioned[parameter] = converted
            deepspeed.zero.Init(module=nn.ParameterList([converted]), config_dict_or_path=settings.config, dtype=dtype)
    for buffer in model.buffers():
        buffer.data = buffer.to(accelerator.device)


def _shard(model: nn.Module, pending: PendingWeights, accelerator: Accelerator) -> None:
    plugin = accelerator.state.fsdp_plugin
    # Otherwise accelerate would distribute the tensors of the first rank, which has none.
    plugin.cpu_ram_efficient_loading = False
    sources = pending.names(model)
    sharded = fsdp2_prepare_model(accelerator, model)
    read = {
        parameter: nn.Parameter(
            _read_shard(parameter, sources[name], pending, accelerator.device), parameter.requires_grad
        )
        for name, parameter in sharded.named_parameters()
        if name in sources
    }
    # Tied embeddings are one parameter under two names.
    places = sharded.named_parameters(remove_duplicate=False)
    shards = {name: read[parameter] for name, parameter in places if parameter in read}
    sharded.load_state_dict(shards, strict=False, assign=True)


def _read_shard(parameter: DTensor, source: Tensor, pending: PendingWeights, device: torch.device) -> DTensor:
    local = torch.empty_like(parameter.to_local(), device=device)
    pending.copy_rows(source, _first_row(parameter), local)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _first_row(parameter: DTensor) -> int:
    """Return the index of the first row of this rank's shard."""
    start, rows = 0, parameter.shape[0]
    for dimension, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard):
            step = -(-rows // parameter.device_mesh.size(dimension))
            before = min(step * parameter.device_mesh.get_local_rank(dimension), rows)
            start, rows = start + before, min(step, rows - before)
    return start


def _check_filled(model: nn.Module) -> None:
    """Check that every parameter and buffer has memory.

    Raises:
        EnvironmentFaultError: One is still on ``meta``.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    empty = [name for name, tensor in tensors if tensor.device.type == "meta"]
    if empty:
        raise EnvironmentFaultError.at("weights", f"{empty[0]} was not read", "report this with the configuration")
