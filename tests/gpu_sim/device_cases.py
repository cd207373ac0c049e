"""Cases that show what the simulated device does and rejects."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch

from llavar_peft.models.pissa import _principal_components
from tests.gpu_sim.simulated_device import DEVICE, SYNCS, MixedDevicesError, simulated_gpu


def describe_device() -> dict[str, Any]:
    """Return how the device presents itself."""
    layer = torch.nn.Linear(4, 4).to(DEVICE)
    loss = layer(torch.ones(2, 4, device=DEVICE)).sum()
    loss.backward()
    stored = io.BytesIO()
    torch.save(layer.state_dict(), stored)
    stored.seek(0)
    return {
        "accelerator": str(torch.accelerator.current_accelerator()),
        "weight": str(layer.weight.device),
        "gradient": str(layer.weight.grad.device) if layer.weight.grad is not None else None,
        "loaded": str(torch.load(stored, weights_only=True)["weight"].device),
        "copied": str(layer.weight.cpu().device),
    }


def mix_devices() -> dict[str, str]:
    """Return what happens to tensors of two devices."""
    here, there, number = torch.ones(3, device=DEVICE), torch.ones(3), torch.tensor(2.0)
    attempts: dict[str, Callable[[], Any]] = {
        "vector": lambda: here + there,
        "number": lambda: here + number,
        "layer": lambda: torch.nn.Linear(3, 3)(here),
        "copy": lambda: here.copy_(there),
        "index": lambda: here[torch.tensor([0, 1])],
    }
    found = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            found[name] = "accepted"
        except MixedDevicesError:
            found[name] = "rejected"
    return found


def count_waits() -> dict[str, int]:
    """Return how often the host waits in each operation."""
    numbers, mask = torch.arange(4.0, device=DEVICE), torch.tensor([True, False, True, False]).to(DEVICE)
    attempts: dict[str, Callable[[], Any]] = {
        "item": lambda: numbers.sum().item(),
        "bool": lambda: bool(mask.any()),
        "tolist": numbers.tolist,
        "cpu": numbers.cpu,
        "nonzero": mask.nonzero,
        "masked index": lambda: numbers[mask],
        "tensor from host": lambda: torch.tensor([1.0], device=DEVICE),
        "non_blocking": lambda: torch.ones(3).to(DEVICE, non_blocking=True),
        "arithmetic": lambda: (numbers * 2 + 1).softmax(0),
        "factory": lambda: torch.zeros(3, device=DEVICE),
        "where": lambda: torch.where(mask, numbers, 0.0),
        "scatter": lambda: numbers.masked_scatter(mask, numbers),
    }
    found = {}
    for name, attempt in attempts.items():
        SYNCS.clear()
        attempt()
        found[name] = SYNCS.total()
    return found


def autocast_dtypes() -> dict[str, str]:
    """Return the dtypes of results under autocast, as CUDA's lists say."""
    x_bf16 = torch.ones(2, 4, device=DEVICE, dtype=torch.bfloat16)
    weight = torch.ones(4, 4, device=DEVICE)
    with torch.autocast("gpu", dtype=torch.bfloat16):
        results = {
            "linear": torch.nn.functional.linear(x_bf16, weight),
            "rsqrt": x_bf16.rsqrt(),
            "softmax": x_bf16.softmax(-1),
            "layer_norm": torch.nn.functional.layer_norm(x_bf16, (4,)),
            "add": x_bf16 + x_bf16,
        }
    return {name: str(one.dtype).removeprefix("torch.") for name, one in results.items()}


def leave_context() -> str:
    """Return the device of a tensor that is made in a second context."""
    with simulated_gpu() as device:
        return str(torch.zeros(1, device=device).device)


def fail() -> None:
    """Raise an error."""
    raise ValueError("the case's own error")


def pissa_components(rows: int, columns: int, rank: int) -> dict[str, Any]:
    """Return where PiSSA computes a weight's components on a machine with this accelerator, and their product."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    a, b = _principal_components(weight, rank, 2.0, seed=7)
    return {"device": str(a.device), "product": (b @ a).tolist()}
