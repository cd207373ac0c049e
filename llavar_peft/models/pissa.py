"""PiSSA: adapters that are initialized with the base's principal components, which are removed from the base.

The base then becomes a residual, W - s B0 A0. An adapter of the residual fits no released base, so it is saved as an
ordinary LoRA of twice the rank on W itself: s (B A - B0 A0) = s [B, -B0] [A; A0]. The saved adapter contains A, B, A0
and B0 unchanged, so that a resumed run builds the same residual and continues from the same A and B.

Source: arXiv 2404.02948 (PiSSA); peft, tuners/lora/layer.py, ``pissa_init``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavar_peft.atomic_files import write_json
from llavar_peft.errors import ConfigError
from llavar_peft.models.tower_tuning import TOWER
from llavar_peft.weights.adapter.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llavar_peft.weights.io.tensor_blocks import open_weights

_ADAPTER = "default"
_A, _B = ".lora_A.weight", ".lora_B.weight"
# The paper's fast SVD, with 4 iterations: an exact one would take hours for a 13B model.
_ITERATIONS = 4


def make_residual(model: Any, checkpoint: Path | None) -> None:
    """Move the principal components of each adapted layer from the base into its adapter.

    Args:
        model: A ``PeftModel`` with new adapters; changed in place.
        checkpoint: A checkpoint of the same run, saved by ``save_for_original_base``, to read A0 and B0 from. None
            computes them.

    Raises:
        ConfigError: The rank exceeds a layer's size.
    """
    stored = open_weights(checkpoint / ADAPTER_WEIGHTS) if checkpoint is not None else None
    for number, (name, layer) in enumerate(_adapted_layers(model)):
        base, rank = layer.get_base_layer(), layer.r[_ADAPTER]
        largest = min(base.weight.shape)
        if rank > largest:
            raise ConfigError.at(
                "tune.tower_rank" if TOWER in name else "tune.rank",
                f"pissa cannot take {rank} components out of {name} (got shape {tuple(base.weight.shape)})",
                f"use a rank of {largest} at most",
            )
        weight, a, b = base.weight.data, layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        if stored is None:
            components = _principal_components(weight, rank, layer.scaling[_ADAPTER], seed=number)
            a.data, b.data = (component.to(weight.device) for component in components)
        else:
            a.data.copy_(stored[name + _A][rank:])
            b.data.copy_(-stored[name + _B][:, rank:])
        # Kept on the CPU and outside the module's state: they are needed only for saving.
        layer.pissa_start = (a.detach().cpu().clone(), b.detach().cpu().clone())
        base.weight.data = (weight.float() - layer.scaling[_ADAPTER] * b.data @ a.data).to(weight.dtype)


def _principal_components(weight: Tensor, rank: int, scaling: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return A and B such that ``scaling * B @ A`` is close to the best approximation of this rank.

    Args:
        weight: On any device. The computation runs on the accelerator of this process if there is one: for a 13B model
            it takes hours on a CPU.
        rank: The number of components.
        scaling: The adapter's factor.
        seed: One for each layer: every rank must remove the same components from its copy of the base.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = weight.device if accelerator is None or accelerator.type == "mps" else accelerator
    devices = [] if device.type == "cpu" else [torch.accelerator.current_device_index()]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        left, values, right = torch.svd_lowrank(weight.detach().to(device, torch.float32), rank, niter=_ITERATIONS)
    root = torch.diag(torch.sqrt(values / scaling))
    return root @ right.T, left @ root


def has_residual_base(model: Any) -> bool:
    """Return whether the base of a ``PeftModel`` is a residual of PiSSA."""
    return any(hasattr(layer, "pissa_start") for _, layer in _adapted_layers(model))


def save_for_original_base(model: Any, folder: Path) -> None:
    """Rewrite a saved adapter of the residual as an adapter of the original base.

    In half precision the two agree up to the rounding of the residual, in float32 up to that of the arithmetic.

    Args:
        folder: The folder that ``save_pretrained`` wrote the adapter to.
    """
    from safetensors.torch import save_file

    tensors = dict(open_weights(folder / ADAPTER_WEIGHTS))
    for name, layer in _adapted_layers(model):
        a0, b0 = layer.pissa_start
        tensors[name + _A] = torch.cat([tensors[name + _A], a0])
        tensors[name + _B] = torch.cat([tensors[name + _B], -b0], dim=1)
    partial = folder / f".{ADAPTER_WEIGHTS}.part"
    save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(folder / ADAPTER_WEIGHTS)
    _, layer = next(_adapted_layers(model))
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    settings.update(r=2 * settings["r"], lora_alpha=2 * settings["lora_alpha"])
    for key in ("rank_pattern", "alpha_pattern"):  # of the vision tower
        settings[key] = {pattern: 2 * value for pattern, value in (settings.get(key) or {}).items()}
    write_json(folder / ADAPTER_CONFIG, settings)


def tensors_for_residual_base(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Turn an adapter that ``save_for_original_base`` wrote back into an adapter of the residual.

    Returns:
        The tensors with A and B as they were trained.
    """
    trained = dict(tensors)
    for name, layer in _adapted_layers(model):
        rank = layer.r[_ADAPTER]
        trained[name + _A], trained[name + _B] = tensors[name + _A][:rank], tensors[name + _B][:, :rank]
    return trained


def _adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the adapted layers under their names in a saved adapter."""
    from peft.tuners.lora import LoraLayer

    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
