"""PiSSA: adapters that start as the base's principal components, which are taken out of the base.

The base is then a residual: W - s B0 A0. An adapter of the residual fits no base that anybody has, so it is saved as an
ordinary LoRA of twice the rank on W itself: s (B A - B0 A0) = s [B, -B0] [A; A0]. That holds A, B, A0 and B0 whole, so
that a resumed run makes the same residual again and goes on from the same A and B.

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
from llavar_peft.weights.adapter.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llavar_peft.weights.io.tensor_blocks import open_weights

_ADAPTER = "default"
_A, _B = ".lora_A.weight", ".lora_B.weight"
# The fast SVD of the paper: a whole one of a 13B model would take hours.
_INITIALISATION = "pissa_niter_4"


def make_residual(model: Any, checkpoint: Path | None) -> None:
    """Move the principal components of each adapted layer from the base into its adapter.

    Args:
        model: A ``PeftModel`` with new adapters; it is changed in place.
        checkpoint: One of this run, saved by ``save_on_whole_base``: A0 and B0 are taken from it. None computes them.

    Raises:
        ConfigError: The rank is larger than a layer.
    """
    stored = open_weights(checkpoint / ADAPTER_WEIGHTS) if checkpoint is not None else None
    for number, (name, layer) in enumerate(_layers(model)):
        base, rank = layer.get_base_layer(), layer.r[_ADAPTER]
        if rank > min(base.weight.shape):
            raise ConfigError.at(
                "tune.rank", f"pissa cannot take {rank} components out of {name} ({tuple(base.weight.shape)})",
                f"use a rank of {min(base.weight.shape)} at most",
            )  # fmt: skip
        whole, a, b = base.weight.data, layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        if stored is None:
            # Drawn from a seed of its own: every rank has to take the same components out of its copy of the base.
            with torch.random.fork_rng(devices=[whole.device] if whole.is_cuda else []):
                torch.manual_seed(number)
                layer.pissa_init(_ADAPTER, _INITIALISATION)  # sets A and B; what it makes of the base is made below
        else:
            a.data.copy_(stored[name + _A][rank:])
            b.data.copy_(-stored[name + _B][:, rank:])
        # Beside the model, on the CPU: they are needed for saving only.
        layer.pissa_start = (a.detach().cpu().clone(), b.detach().cpu().clone())
        base.weight.data = (whole.float() - layer.scaling[_ADAPTER] * b.data @ a.data).to(whole.dtype)


def is_residual(model: Any) -> bool:
    """Whether the base of a ``PeftModel`` is what PiSSA left of it."""
    return any(hasattr(layer, "pissa_start") for _, layer in _layers(model))


def save_on_whole_base(model: Any, folder: Path) -> None:
    """Rewrites a saved adapter of a residual as one of the whole base.

    In half precision the two agree to the rounding of the residual, in float32 to that of the arithmetic.

    Args:
        model: The ``PeftModel``.
        folder: Where ``save_pretrained`` put its adapter.
    """
    from safetensors.torch import save_file

    tensors = dict(open_weights(folder / ADAPTER_WEIGHTS))
    for name, layer in _layers(model):
        a0, b0 = layer.pissa_start
        tensors[name + _A] = torch.cat([tensors[name + _A], a0])
        tensors[name + _B] = torch.cat([tensors[name + _B], -b0], dim=1)
    aside = folder / f".{ADAPTER_WEIGHTS}.part"
    save_file(tensors, aside, metadata={"format": "pt"})
    aside.replace(folder / ADAPTER_WEIGHTS)
    _, some = next(_layers(model))
    rank = 2 * some.r[_ADAPTER]
    settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    settings.update(r=rank, lora_alpha=some.scaling[_ADAPTER] * rank, use_rslora=False)
    write_json(folder / ADAPTER_CONFIG, settings)


def on_residual(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter of the whole base, as ``save_on_whole_base`` wrote it, as one of the residual again.

    Args:
        model: The ``PeftModel``, made residual from the same checkpoint.
        tensors: The adapter's.

    Returns:
        The same with A and B as they were trained.
    """
    raw = dict(tensors)
    for name, layer in _layers(model):
        rank = layer.r[_ADAPTER]
        raw[name + _A], raw[name + _B] = tensors[name + _A][:rank], tensors[name + _B][:, :rank]
    return raw


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The adapted layers by the names they have in a saved adapter."""
    from peft.tuners.lora import LoraLayer

    yield from ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))
