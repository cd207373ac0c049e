"""Make transformers and accelerate accept the simulated device where they accept a CUDA device."""

from __future__ import annotations

import os
from types import CodeType
from typing import Any

import torch

from tests.gpu_sim.simulated_device import DEVICE, NAME, SimulatedTensor


def announce_device() -> None:
    """Name the device in accelerate's own variable; before accelerate is imported."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = DEVICE
    # transformers' threads that load weights do not see the mode of the thread that asks for them.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"


def support_half_precision() -> None:
    """Allow bf16 and fp16 training: both libraries list the devices that they know.

    The loss scale begins at a value at which the few steps of a test do not overflow, so that they train something.
    """
    import accelerate.accelerator
    import transformers.training_args

    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    accelerate.accelerator.get_grad_scaler = lambda *_, **kwargs: torch.amp.GradScaler(NAME, init_scale=64.0, **kwargs)
    function: Any = accelerate.accelerator.Accelerator.__init__
    function.__code__ = _extend_device_list(function.__code__)


def support_4_bits() -> None:
    """Let bitsandbytes' 4-bit weights be tensors of the device; before transformers loads quantized weights.

    They are parameters of a class of their own, which PyTorch makes of a tensor by ``_make_subclass``. It would lose
    what a simulated tensor wraps. Its operations reach the simulated device as any other, which runs bitsandbytes' own
    definitions for CPUs.
    """
    from bitsandbytes.nn import Params4bit

    # Libraries also look at the name of the class.
    simulated: Any = type(Params4bit.__name__, (Params4bit, SimulatedTensor), {})
    make = torch.Tensor._make_subclass

    def make_subclass(cls: Any, data: torch.Tensor, requires_grad: bool = False, **options: Any) -> torch.Tensor:
        if cls is simulated or (cls is Params4bit and isinstance(data, SimulatedTensor)):
            host = data.host if isinstance(data, SimulatedTensor) else data
            made: torch.Tensor = SimulatedTensor.__new__(simulated, host, requires_grad)
            return made
        return make(cls, data, requires_grad, **options)

    torch.Tensor._make_subclass = make_subclass  # type: ignore[method-assign,assignment]


def _extend_device_list(code: CodeType) -> CodeType:
    """Add the device's name to the tuple of devices with fp16 in the constants of a function."""
    found = [one for one in code.co_consts if isinstance(one, tuple) and {"cuda", "xpu", "mps"} <= set(one)]
    if len(found) != 1:
        raise RuntimeError("accelerate has no list of the devices with fp16 any more")
    return code.replace(co_consts=tuple((*one, NAME) if one is found[0] else one for one in code.co_consts))
