"""Out-of-memory errors: report the memory in use and the settings that would help, cheapest first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from llavar_peft.errors import EnvironmentFaultError
from llavar_peft.models.launch_environment import requested_sharding, uses_gpu
from llavar_peft.recipe.schema import Full, Lora, ModelConfig, Stage

_TEXTS = ("out of memory", "can't allocate memory", "not enough memory")
_GIB = 2**30
_SHARD = "shard the model over the GPUs (examples/accelerate/fsdp2_8gpu.yaml)"
_SHARD_MORE = "shard the model over more GPUs"


@contextmanager
def explain_out_of_memory(stage: Stage, model: ModelConfig, *, ranks: int) -> Iterator[None]:
    """Replace the libraries' errors about memory by one that names remedies.

    Raises:
        EnvironmentFaultError: There was not enough memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error).lower() for text in _TEXTS):
            raise
        fix = "; or ".join(memory_remedies(stage, model, ranks=ranks)) or "use a device with more memory"
        raise EnvironmentFaultError.at(f"stage {stage.name}", f"out of memory ({_memory_use()})", fix) from error


def memory_remedies(stage: Stage, model: ModelConfig, *, ranks: int) -> list[str]:
    """Return settings that need less memory and are not set yet; those that do not change the result come first."""
    remedies = []
    sharding = requested_sharding()
    if stage.gradient_checkpointing is not True:
        remedies.append("set gradient_checkpointing: true")
    has_several_records = stage.micro_batch_size > 1
    if has_several_records and stage.packing and (stage.max_tokens is None or stage.max_tokens > stage.max_length):
        remedies.append(f"set max_tokens: {stage.max_length}")
    elif has_several_records:
        remedies.append(f"set micro_batch_size: {stage.micro_batch_size // 2} (global_batch_size can stay)")
    # Sharding divides the states already, and those of 8 bits cannot be sharded.
    if stage.optim.optimizer == "adamw" and uses_gpu() and sharding is None:
        remedies.append("set optim.optimizer: paged_adamw_8bit")
    if isinstance(stage.tune, Full):
        if ranks > 1:
            remedies.append(_SHARD if sharding is None else _SHARD_MORE)
        else:
            remedies.append("set tune: lora")
    # PiSSA is rejected on a quantized base.
    if isinstance(stage.tune, Lora) and stage.tune.variant != "pissa" and model.quantize is None:
        remedies.append("set model.quantize: nf4")
    if stage.max_length > 1024:
        remedies.append(f"set max_length: {stage.max_length // 2}")
    return remedies


def _memory_use() -> str:
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        peak = torch.cuda.max_memory_allocated()
        return f"peak {peak / _GIB:.1f} GiB of the device's {total / _GIB:.1f}"
    used, memory = psutil.Process().memory_info().rss, psutil.virtual_memory()
    return (
        f"{used / _GIB:.1f} GiB in use, {memory.available / _GIB:.1f} of the machine's {memory.total / _GIB:.1f} free"
    )
