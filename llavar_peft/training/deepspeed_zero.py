"""DeepSpeed's ZeRO under ``accelerate launch``: what of it this library looks after itself.

DeepSpeed steps inside ``backward``, so that a gradient that is not finite is noticed after the step; nothing of such a
step is saved. Its checkpoints are pickles; here each rank's partition of the optimizer goes into a safetensors file.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llavar_peft.errors import ConfigError, EnvironmentFaultError

_WHOLE_WEIGHTS = "stage3_gather_16bit_weights_on_model_save"
_MASTERS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")


def configure_zero(accelerator: Accelerator) -> bool:
    """Look whether the run is DeepSpeed's, and sees to it that its weights can be saved whole.

    Args:
        accelerator: Just made.

    Returns:
        Whether it is.

    Raises:
        ConfigError: DeepSpeed is to do what is done here.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return False
    settings: dict[str, Any] = plugin.deepspeed_config
    for name in ("optimizer", "scheduler"):
        if name in settings:
            raise ConfigError.at(f"deepspeed_config:{name}", "is the recipe's to say", f"take {name!r} out")
    if plugin.zero_stage == 3:
        settings["zero_optimization"][_WHOLE_WEIGHTS] = True
    return True


def masters(optimizer: Any) -> tuple[dict[str, Tensor], torch.optim.Optimizer]:
    """What this rank's optimizer steps under ZeRO.

    Args:
        optimizer: DeepSpeed's.

    Returns:
        The flat partitions by their place, and the optimizer over them.

    Raises:
        EnvironmentFaultError: DeepSpeed keeps them elsewhere, as without ZeRO or with its offload to disk.
    """
    for attribute in _MASTERS:
        found = getattr(optimizer, attribute, None)
        if found and all(each.numel() for each in found):
            return {str(place): each for place, each in enumerate(found)}, optimizer.optimizer
    raise EnvironmentFaultError.at(
        "DeepSpeed", "keeps its optimizer states where they cannot be saved", "use ZeRO 1 to 3, without offload to disk"
    )


def reset_zero() -> None:
    """Let models be built plain again: transformers partitions them as long as it knows of ZeRO-3's settings."""
    if "deepspeed" in sys.modules:
        unset_hf_deepspeed_config()
