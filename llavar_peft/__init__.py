"""LLaVAR, LLaVA for text-rich images, on today's Hugging Face stack.

Names are imported when they are first used: ``import llavar_peft`` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llavar_peft.config import (
        DataConfig,
        Full,
        Lora,
        ModelConfig,
        OptimConfig,
        ProbeConfig,
        Projector,
        Recipe,
        Stage,
    )
    from llavar_peft.data.images import prepare_image
    from llavar_peft.data.tokenize import encode_record
    from llavar_peft.inference.chat import Chat, load_chat
    from llavar_peft.models.adapters import load_adapter
    from llavar_peft.models.build import build_model
    from llavar_peft.models.configuration import LlavarConfig
    from llavar_peft.models.exporting import export
    from llavar_peft.models.merging import merge_adapter
    from llavar_peft.models.modeling import LlavarForConditionalGeneration
    from llavar_peft.models.processing import LlavarProcessor
    from llavar_peft.recipes import full_finetuning, load_recipe, lora, projector_pretraining
    from llavar_peft.training.trainer import Trainer
    from llavar_peft.weights.delta import apply_delta, make_delta
    from llavar_peft.weights.verify import verify_delta

__version__ = "0.1.0"

__all__ = [
    "Chat",
    "DataConfig",
    "Full",
    "LlavarConfig",
    "LlavarForConditionalGeneration",
    "LlavarProcessor",
    "Lora",
    "ModelConfig",
    "OptimConfig",
    "ProbeConfig",
    "Projector",
    "Recipe",
    "Stage",
    "Trainer",
    "__version__",
    "apply_delta",
    "build_model",
    "encode_record",
    "export",
    "full_finetuning",
    "load_adapter",
    "load_chat",
    "load_recipe",
    "lora",
    "make_delta",
    "merge_adapter",
    "prepare_image",
    "projector_pretraining",
    "verify_delta",
]

_HOMES = {
    "DataConfig": "config",
    "Full": "config",
    "Lora": "config",
    "ModelConfig": "config",
    "OptimConfig": "config",
    "ProbeConfig": "config",
    "Projector": "config",
    "Recipe": "config",
    "Stage": "config",
    "prepare_image": "data.images",
    "encode_record": "data.tokenize",
    "Chat": "inference.chat",
    "load_chat": "inference.chat",
    "load_adapter": "models.adapters",
    "build_model": "models.build",
    "LlavarConfig": "models.configuration",
    "LlavarForConditionalGeneration": "models.modeling",
    "LlavarProcessor": "models.processing",
    "full_finetuning": "recipes",
    "load_recipe": "recipes",
    "lora": "recipes",
    "projector_pretraining": "recipes",
    "Trainer": "training.trainer",
    "apply_delta": "weights.delta",
    "make_delta": "weights.delta",
    "export": "models.exporting",
    "merge_adapter": "models.merging",
    "verify_delta": "weights.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
