"""Sharding under ``accelerate launch``, by FSDP or DeepSpeed's ZeRO: set it up, check it, gather whole weights.

DeepSpeed takes the optimizer step inside ``backward``. A gradient that is not finite is therefore found after the step;
nothing of such a step is saved.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llavar_peft.compat.dependency_internals import enable_fsdp_on_cpu
from llavar_peft.errors import ConfigError, EnvironmentFaultError
from llavar_peft.models.cross_attention import CrossAttentionLayer
from llavar_peft.models.decoder_structure import find_layers
from llavar_peft.models.launch_environment import Sharding, check_offload, requested_sharding

_COMPUTE = {"bf16": torch.bfloat16, "fp16": torch.float16}
_GATHER_ON_SAVE = "stage3_gather_16bit_weights_on_model_save"


def configure_sharding(accelerator: Accelerator, *, fp32_reduction: bool) -> Sharding | None:
    """Set up the sharding that ``accelerate launch`` was configured for, and return its kind.

    Args:
        accelerator: The accelerator of the run.
        fp32_reduction: Whether gradients are summed over the ranks in float32.

    Raises:
        ConfigError: DeepSpeed's configuration sets the optimizer or the schedule.
        EnvironmentFaultError: FSDP was requested and accelerate does not run it, it was requested in version 1, or
            DeepSpeed's configuration keeps something on a disk.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _configure_zero(accelerator, fp32_reduction=fp32_reduction)
        return "zero"
    requested = requested_sharding()
    if requested is None:
        return None
    if accelerator.distributed_type == DistributedType.MULTI_CPU:
        enable_fsdp_on_cpu(accelerator)
    if accelerator.distributed_type != DistributedType.FSDP:
        raise EnvironmentFaultError.at(
            "accelerate",
            f"FSDP is not enabled (got {accelerator.distributed_type}, expected {DistributedType.FSDP})",
            "check the configuration given to accelerate launch",
        )
    _set_policy(accelerator, fp32_reduction=fp32_reduction)
    return requested


def _set_policy(accelerator: Accelerator, *, fp32_reduction: bool) -> None:
    """Compute in the accelerator's precision, but return the loss in the float32 in which it is computed.

    accelerate's policy rounds the output of every unit to the precision of the computation, and the head's output is
    the loss. An ``output_dtype`` of float32 would double the memory of the hidden states between the layers.
    """
    plugin = accelerator.state.fsdp_plugin
    compute = _COMPUTE.get(accelerator.mixed_precision)
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=compute, reduce_dtype=torch.float32 if fp32_reduction else compute
    )


def choose_layers(model: Any, accelerator: Accelerator) -> None:
    """Let FSDP shard a model by its own decoder layers and their cross-attention, whatever its configuration names.

    A configuration is written for one kind of language model: the shipped ones name LLaMA's layers.
    """
    plugin = accelerator.state.fsdp_plugin
    present = {type(module).__name__ for module in model.modules()}
    named = [name for name in plugin.transformer_cls_names_to_wrap or () if name in present]
    layers = named or [type(find_layers(model.get_decoder())[1][0]).__name__]
    # Within a decoder layer's call, but not among its modules.
    own = [CrossAttentionLayer.__name__]
    plugin.transformer_cls_names_to_wrap = [*layers, *(name for name in own if name in present and name not in layers)]


def _configure_zero(accelerator: Accelerator, *, fp32_reduction: bool) -> None:
    plugin = accelerator.state.deepspeed_plugin
    settings: dict[str, Any] = plugin.deepspeed_config
    for name in ("optimizer", "scheduler"):
        if name in settings:
            raise ConfigError.at(
                f"deepspeed_config:{name}",
                "conflicts with the recipe, which sets it",
                f"remove {name!r} from the DeepSpeed configuration",
            )
    zero = settings.get("zero_optimization", {})
    for part in ("optimizer", "param"):
        check_offload(part, zero.get(f"offload_{part}", {}).get("device", "none"))
    if plugin.zero_stage == 3:
        zero[_GATHER_ON_SAVE] = True
    if fp32_reduction:
        settings["communication_data_type"] = "fp32"


def reset_zero() -> None:
    """Forget ZeRO-3's settings: while transformers knows them, it partitions every model that is built."""
    if "deepspeed" in sys.modules:
        unset_hf_deepspeed_config()


def check_sharding(model: nn.Module) -> None:
    """Check that FSDP2 has sharded every parameter of a prepared model, frozen ones as well.

    Raises:
        EnvironmentFaultError: A parameter is not sharded.
    """
    unsharded = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    if unsharded:
        raise EnvironmentFaultError.at("FSDP", f"{unsharded[0]} is not sharded", "report this with the configuration")


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
        whole = {} if trained_only else accelerator.get_state_dict(model) or {}
        return {**whole, **_gather_trained(model, accelerator)}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    state = get_model_state_dict(model, options=options)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _gather_trained(model: nn.Module, accelerator: Accelerator) -> dict[str, Tensor]:
    """Gather the float32 weights that the optimizer updates; those in the model may be rounded to 16 bits."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    state = {}
    for name, parameter in accelerator.unwrap_model(model).named_parameters():
        if not parameter.requires_grad:
            continue
        exact = safe_get_full_fp32_param(parameter)
        with deepspeed.zero.GatheredParameters([parameter]) if exact is None else nullcontext():
            if accelerator.is_main_process:
                state[name] = (parameter if exact is None else exact).detach().cpu().clone()
    return state
