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
        EnvironmentFaultError: It was configured for FSDP version 1, with FSDP's offload, with offload to a disk, to
            divide layers or rows, or to shard in groups that do not exist.
    """
    fsdp = _is_set("ACCELERATE_USE_FSDP") and not _is_set("ACCELERATE_USE_DEEPSPEED")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        if fsdp and "LOCAL_RANK" in os.environ:
            # On a GPU accelerate would wrap the model nevertheless.
            raise EnvironmentFaultError.at(
                "accelerate",
                "FSDP needs several processes (got 1)",
                "launch with examples/accelerate/one_gpu.yaml, or with --num_processes 2 or more",
            )
        return None
    _check_parallelism()
    _check_groups(fsdp=fsdp)
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        for part in ("optimizer", "param"):
            check_offload(part, os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none"))
        return "zero"
    if not fsdp:
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


def _check_groups(*, fsdp: bool) -> None:
    """Reject groups of replicas and shards into which the processes cannot be divided, or that only FSDP has."""
    names = ("parallelism_config_dp_replicate_size", "parallelism_config_dp_shard_size")
    replicas, shards = (int(os.environ.get(name.upper(), "1")) for name in names)
    processes = int(os.environ["WORLD_SIZE"])
    if not _is_set("ACCELERATE_USE_PARALLELISM_CONFIG") or (replicas == shards == 1 and not fsdp):
        return
    got = f"got {names[0]}: {replicas}, {names[1]}: {shards}"
    if not fsdp:
        raise EnvironmentFaultError.at(
            "accelerate",
            f"only FSDP divides its processes into groups ({got})",
            f"remove {names[0]} and {names[1]}, or use FSDP version 2 (examples/accelerate/fsdp2_8gpu.yaml)",
        )
    if shards == 1 or replicas * shards != processes:
        fitting = replicas if processes % replicas == 0 and replicas < processes else 1
        raise EnvironmentFaultError.at(
            "accelerate",
            f"the processes cannot be divided into these groups ({got}, expected a product of {processes})",
            f"set {names[0]}: {fitting} and {names[1]}: {processes // fitting}",
        )


def check_offload(part: str, device: str) -> None:
    """Reject offload to a disk, where DeepSpeed keeps states that cannot be saved with a checkpoint.

    Args:
        part: ``"optimizer"`` or ``"param"``.
        device: The device that ``accelerate``'s or DeepSpeed's configuration names.

    Raises:
        EnvironmentFaultError: The device is a disk.
    """
    if device == "nvme":
        raise EnvironmentFaultError.at(
            "accelerate",
            f"offload to a disk is not supported (got offload_{part}_device: nvme, expected cpu or none)",
            f"set offload_{part}_device: cpu",
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
    own = seen == 1 and "CUDA_VISIBLE_DEVICES" in os.environ
    if started > seen and not own:
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
