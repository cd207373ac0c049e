"""Adapters saved as by a run, with every trained parameter changed, so that no error in a merge goes unnoticed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

import llavar_peft
from llavar_peft import ModelConfig, build_model
from llavar_peft.models.tuning import apply_tuning
from llavar_peft.recipe.schema import Lora
from llavar_peft.training.save_weights import save_trained

TINY_PARTS = Path(llavar_peft.__file__).parent / "assets/tiny"
LANGUAGE_MODEL, VISION_TOWER = TINY_PARTS / "language_model", TINY_PARTS / "vision_tower"


def save_moved_adapter(folder: Path, base: ModelConfig, tune: Lora, *, seed: int = 0, by: float = 0.03) -> Any:
    """Save an adapter after changing every trained parameter, and return peft's model."""
    model, processor = build_model(base)
    wrapped = apply_tuning(model, tune)
    generator = torch.Generator().manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * by
    folder.mkdir(parents=True)
    save_trained(wrapped, processor, folder, state=wrapped.state_dict(), tune=tune, base=base)
    return wrapped.eval()


def save_wide_model(folder: Path) -> Path:
    """Save a model whose language model is more than twice as wide as its tower, like LLaVAR's (5120 and 1024)."""
    tower = CLIPVisionConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=120, patch_size=10
    )
    text = LlamaConfig(
        hidden_size=112, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=860,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    for name, source, config in (("t", VISION_TOWER, tower), ("l", LANGUAGE_MODEL, text)):
        made = CLIPVisionModel(config) if name == "t" else LlamaForCausalLM(config)
        made.save_pretrained(folder.with_name(name))
        for path in source.iterdir():
            if path.name not in ("config.json", "model.safetensors"):
                shutil.copy(path, folder.with_name(name))
    parts = ModelConfig(
        language_model=str(folder.with_name("l")), vision_tower=str(folder.with_name("t")), dtype="float32"
    )
    model, processor = build_model(parts)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
