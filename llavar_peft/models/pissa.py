"""PiSSA: adapters that start as the base's own principal part, and are saved as ordinary ones on the untouched base.

While training, the base's weight is what the first r singular vectors leave of it, W - s B0 A0, and A0, B0 are trained
on to A, B. An adapter saved as it is would fit no base on disk, so it is saved as W + s (B A - B0 A0): a LoRA of rank
2 r with A' = [A; A0] and B' = [B, -B0]. Everything that resuming needs is in it.

Source: PiSSA (arXiv 2404.02948), section 3 and appendix C; peft, tuners/lora/layer.py (``pissa_init``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llavar_peft.durable import write_json
from llavar_peft.errors import WeightsError
from llavar_peft.weights.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llavar_peft.weights.store import open_weights

_ROUNDS = 4
"""Of subspace iteration in the randomised decomposition; peft's ``pissa_niter_4``."""
_START_A, _START_B = "pissa_start_a", "pissa_start_b"
_ADAPTER = "default"
_PREFIX = "base_model.model."


def start_pissa(model: Any) -> None:
    """Moves the principal part of each adapted weight into its adapter, in place.

    The decomposition is drawn from a fixed seed of its own: a resumed run finds the same one.

    Args:
        model: A ``PeftModel`` whose adapters are fresh, on a base that is not quantized.
    """
    for number, (_, layer) in enumerate(_layers(model)):
        down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
        weight, scale = layer.base_layer.weight, float(layer.scaling[_ADAPTER])
        with torch.no_grad(), torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(number)
            left, values, right = torch.svd_lowrank(weight.float(), q=down.shape[0], niter=_ROUNDS)
            root = (values / scale).sqrt()
            down.copy_(root[:, None] * right.T)
            up.copy_(left * root)
            _take_out(layer, down.detach().clone(), up.detach().clone())


def is_pissa(model: nn.Module) -> bool:
    """Whether a model's adapters started as their base's principal part."""
    return any(True for _ in _started(model))


def settle_pissa(model: Any, folder: Path) -> None:
    """Rewrites an adapter that ``save_pretrained`` has just saved, as one on the untouched base.

    Args:
        model: The ``PeftModel``.
        folder: Where it was saved.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.clone() for name, tensor in open_weights(folder / ADAPTER_WEIGHTS).items()}
    for name, layer in _started(model):
        down, up = (f"{_PREFIX}{name}.lora_{part}.weight" for part in "AB")
        start_down, start_up = (getattr(layer, part).to(tensors[down]).cpu() for part in (_START_A, _START_B))
        tensors[down] = torch.cat([tensors[down], start_down])
        tensors[up] = torch.cat([tensors[up], -start_up], dim=1)
    aside = folder / f".{ADAPTER_WEIGHTS}.part"
    save_file(tensors, aside, metadata={"format": "pt"})
    aside.replace(folder / ADAPTER_WEIGHTS)
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    doubled = {key: 2 * config[key] for key in ("r", "lora_alpha")}
    write_json(folder / ADAPTER_CONFIG, {**config, **doubled})


def resume_pissa(model: Any, folder: Path) -> dict[str, Tensor]:
    """Makes a freshly started model start where a saved one did.

    Bit for bit where this machine decomposes the base as the other did; elsewhere the base's weights are moved by the
    difference, which costs a rounding.

    Args:
        model: The ``PeftModel``, after ``start_pissa``.
        folder: Of the saved adapter.

    Returns:
        The adapter's tensors as they were while training, for ``load_adapter_weights``.

    Raises:
        WeightsError: A tensor is missing or of another rank.
    """
    tensors = dict(open_weights(folder / ADAPTER_WEIGHTS))
    for name, layer in _started(model):
        down, up = (f"{_PREFIX}{name}.lora_{part}.weight" for part in "AB")
        rank = layer.lora_A[_ADAPTER].weight.shape[0]
        if down not in tensors or up not in tensors or tensors[down].shape[0] != 2 * rank:
            raise WeightsError.at(
                f"{folder / ADAPTER_WEIGHTS}:{down}",
                f"not a PiSSA adapter of rank {rank}",
                "resume with its own recipe",
            )
        start_down, start_up = tensors[down][rank:].clone(), -tensors[up][:, rank:]
        tensors[down], tensors[up] = tensors[down][:rank].clone(), tensors[up][:, :rank].clone()
        old_down, old_up = getattr(layer, _START_A), getattr(layer, _START_B)
        start_down, start_up = start_down.to(old_down), start_up.to(old_up)
        if not (torch.equal(old_down, start_down) and torch.equal(old_up, start_up)):
            weight = layer.base_layer.weight
            whole = weight.data.float() + float(layer.scaling[_ADAPTER]) * (old_up @ old_down)
            weight.data = whole.to(weight.dtype)
            _take_out(layer, start_down, start_up)
    return tensors


def _take_out(layer: Any, down: Tensor, up: Tensor) -> None:
    weight = layer.base_layer.weight
    weight.data = (weight.data.float() - float(layer.scaling[_ADAPTER]) * (up @ down)).to(weight.dtype)
    layer.register_buffer(_START_A, down, persistent=False)
    layer.register_buffer(_START_B, up, persistent=False)


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    return ((name, module) for name, module in base.named_modules() if isinstance(module, LoraLayer))


def _started(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, layer) for name, layer in _layers(model) if hasattr(layer, _START_A))
