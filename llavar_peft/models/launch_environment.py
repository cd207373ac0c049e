"""What the launcher and the machine decide for this process: its device, its number format, and the sharding.

Training, quantization and inference ask here, so that they agree before there is a process group.
"""

from __future__ import annotations

import os
from typing import Literal

import torch

from llavar_peft.errors import EnvironmentFaultError

Sharding = Literal["fsdp2", "zero"]

_SHARED_RECORDS = ("tp_size", "cp_size", "sp_size")
"""Settings of accelerate for tensor, context and sequence parallelism."""
_TRUE = ("1", "true", "yes", "y", "on", "t")


def requested_sharding() -> Sharding | None:
    """Return how ``accelerate launch`` was configured to shard the model over several processes.

    Raises:
        EnvironmentFaultError: It was configured for FSDP version 1 or with FSDP's offload, or to divide layers or rows.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    _check_parallelism()
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        return "zero"
    if not _is_set("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        # It flattens the parameters of a unit into one tensor, which needs one dtype, and ours are of two: the trained
        # ones float32, the frozen ones 16-bit. On a CPU accelerate would silently run DDP.
        raise EnvironmentFaultError.at(
            "accelerate", "FSDP version 1 is not supported", "set fsdp_version: 2 (examples/accelerate/fsdp2_8gpu.yaml)"
        )
    if _is_set("FSDP_OFFLOAD_PARAMS"):
        raise EnvironmentFaultError.at(
            "accelerate",
            "FSDP with fsdp_offload_params is not supported",
            "set fsdp_offload_params: false, or use DeepSpeed's offload (offload_optimizer_device: cpu in "
            "examples/accelerate/zero3_8gpu.yaml)",
        )
    return "fsdp2"


def _check_parallelism() -> None:
    """Reject launches in which the ranks would share records: each rank trains on its own."""
    sizes = ((name, os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")) for name in _SHARED_RECORDS)
    named = [f"parallelism_config_{name}: {size}" for name, size in sizes if size != "1"]
    if _is_set("ACCELERATE_USE_MEGATRON_LM"):
        named.append("distributed_type: MEGATRON_LM")
    if named:
        raise EnvironmentFaultError.at(
            "accelerate",
            f"only the records and the weights can be divided among processes (got {', '.join(named)})",
            "use DDP, FSDP version 2 or DeepSpeed ZeRO (examples/accelerate)",
        )


def uses_deepspeed() -> bool:
    """Whether ``accelerate launch`` was configured for DeepSpeed, with any number of processes."""
    return _is_set("ACCELERATE_USE_DEEPSPEED")


def uses_gpu() -> bool:
    """Whether this process computes on a CUDA device: there is one, and accelerate was not told to use the CPU."""
    return torch.cuda.is_available() and not _is_set("ACCELERATE_USE_CPU")


def uses_accelerator() -> bool:
    """Whether this process computes on any accelerator, such as a CUDA device or Apple's MPS."""
    available = torch.cuda.is_available() or torch.accelerator.is_available()
    return available and not _is_set("ACCELERATE_USE_CPU")


def claim_device() -> torch.device:
    """Make the GPU of this process its current one, and return it; without GPUs, return the CPU.

    A process that a launcher started uses the GPU of its ``LOCAL_RANK``, as accelerate numbers them. Any other process
    uses the first one that it sees, as ``transformers.Trainer`` does; ``CUDA_VISIBLE_DEVICES`` chooses which that is.

    Raises:
        EnvironmentFaultError: The launcher started more processes on this machine than it has GPUs.
    """
    if not uses_gpu():
        return torch.device("cpu")
    seen, started = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # A process that sees one GPU may have been given its own, as Slurm does.
    if started > seen > 1:
        raise EnvironmentFaultError.at(
            "LOCAL_WORLD_SIZE",
            f"there are more processes than GPUs on this machine (got {started}, expected at most {seen})",
            f"launch with --num_processes {seen} for each machine",
        )
    device = torch.device("cuda", max(int(os.environ.get("LOCAL_RANK", "0")), 0) % seen)
    torch.cuda.set_device(device)
    return device


def half_precision() -> torch.dtype | None:
    """Return the 16-bit number format that ``auto`` uses on this process's GPU; None is float32.

    PyTorch counts GPUs that emulate bfloat16 as supporting it. These (V100, T4) have fast float16 arithmetic instead.
    """
    if not uses_gpu():
        return None
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16 if torch.cuda.get_device_capability() >= (7, 0) else None


def describe_half_precision() -> str:
    """Return why ``auto`` does not use bfloat16 on this GPU; an empty string if it does, or if there is no GPU."""
    if not uses_gpu() or half_precision() is torch.bfloat16:
        return ""
    major, minor = torch.cuda.get_device_capability()
    chosen = "float16, trained with loss scaling" if half_precision() else "float32"
    return f"{torch.cuda.get_device_name()} ({major}.{minor}) has no bfloat16 arithmetic; 'auto' is {chosen}"


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in _TRUE
