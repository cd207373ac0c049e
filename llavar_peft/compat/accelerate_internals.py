"""The parts of accelerate that have no public counterpart."""

from __future__ import annotations

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin


def enable_fsdp_on_cpu(accelerator: Accelerator) -> None:
    """Switch an accelerator of several CPU processes from DDP to the FSDP of its environment variables.

    Replaces the choice in ``AcceleratorState.__init__``, which considers FSDP only where each process has a GPU or
    another accelerator, and ignores a plugin passed to ``Accelerator``. Needed since accelerate 1.0.
    """
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    # Both states: every new AcceleratorState copies that of the process.
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
