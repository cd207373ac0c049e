"""Shard a model whose values are still pending, and read each rank's shards from the files.

No rank holds more than its shards and a block of a tensor. The ranks of a node read the same files, which the operating
system caches once.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor, Shard

from llavar_peft.errors import EnvironmentFaultError
from llavar_peft.models.build_model import build_model, build_pending_model
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.pending_weights import PendingWeights
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.recipe.schema import ModelConfig
from llavar_peft.training.sharding import is_fsdp_requested

logger = logging.getLogger(__name__)


def build_for_training(
    config: ModelConfig, processes: PartialState, *, seed: int
) -> tuple[LlavarForConditionalGeneration, LlavarProcessor]:
    """Build a model with as little host memory as this run's kind of distribution allows.

    Args:
        config: The model.
        processes: The processes of the run.
        seed: As in ``build_model``.

    Returns:
        What ``build_model`` returns; the weights are pending if they will be sharded.
    """
    if config.quantize is None and processes.num_processes > 1 and is_fsdp_requested():
        return build_pending_model(config, seed=seed)
    return build_model(config, seed=seed)


def shard_pending(model: Any, pending: PendingWeights, accelerator: Accelerator) -> None:
    """Shard a model with FSDP2, as accelerate would, and read the shards, in place.

    Args:
        model: The tuned model.
        pending: Its values.
        accelerator: The accelerator of the run, with FSDP2.

    Raises:
        EnvironmentFaultError: A parameter has no values.
    """
    plugin = accelerator.state.fsdp_plugin
    # Otherwise accelerate would distribute the tensors of the first rank, which has none.
    plugin.cpu_ram_efficient_loading = False
    sources = pending.names(model)
    sharded = fsdp2_prepare_model(accelerator, model)
    device = torch.device("cpu") if isinstance(plugin.cpu_offload, CPUOffloadPolicy) else accelerator.device
    shards = {
        name: _read_shard(parameter, sources[name], pending, device)
        for name, parameter in sharded.named_parameters()
        if name in sources
    }
    sharded.load_state_dict(shards, strict=False, assign=True)
    check_filled(sharded)


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


def check_filled(model: nn.Module) -> None:
    """Check that every parameter and buffer has memory.

    Raises:
        EnvironmentFaultError: One is still on ``meta``.
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    empty = [name for name, tensor in tensors if tensor.device.type == "meta"]
    if empty:
        raise EnvironmentFaultError.at("FSDP", f"{empty[0]} was not read", "report this with the configuration")
