"""Adapters as a run saves them, with every trained number moved: nothing of a merge may go unnoticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import llavar_peft
from llavar_peft import ModelConfig, build_model
from llavar_peft.config import Lora
from llavar_peft.models.tuning import prepare_for
from llavar_peft.training.saving import save_whole

TINY_PARTS = Path(llavar_peft.__file__).parent / "assets/tiny"
LANGUAGE_MODEL, VISION_TOWER = TINY_PARTS / "language_model", TINY_PARTS / "vision_tower"


def save_moved_adapter(folder: Path, base: ModelConfig, tune: Lora, *, seed: int = 0, by: float = 0.03) -> Any:
    """Saves an adapter whose every trained number was moved; returns peft's model."""
    model, processor = build_model(base)
    wrapped = prepare_for(model, tune)
    generator = torch.Generator().manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * by
    folder.mkdir(parents=True)
    save_whole(wrapped, processor, folder, state={}, tune=tune, base=base)
    return wrapped.eval()
