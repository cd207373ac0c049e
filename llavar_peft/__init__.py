"""LLaVAR, LLaVA for text-rich images, on the current Hugging Face stack.

Names are imported on first use: ``import llavar_peft`` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llavar_peft.data.encode_record import encode_record
    from llavar_peft.data.image_preparation import prepare_image
    from llavar_peft.hub.push_folder import push_to_hub
    from llavar_peft.inference.chat import Chat, load_chat, parse_answer
    from llavar_peft.models.adapter_loading import load_adapter
    from llavar_peft.models.bake_adapter import bake_adapter
    from llavar_peft.models.build_model import build_model
    from llavar_peft.models.export_layout import export
    from llavar_peft.models.llavar_config import LlavarConfig
    from llavar_peft.models.merge_adapter import merge_adapter
    from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
    from llavar_peft.models.processing_llavar import LlavarProcessor
    from llavar_peft.recipe.presets import load_recipe
    from llavar_peft.recipe.resolution import CrossAttention, Tiles
    from llavar_peft.recipe.schema import (
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
    from llavar_peft.recipe.stages import full_finetuning, lora, projector_pretraining
    from llavar_peft.training.trainer import Trainer
    from llavar_peft.weights.delta.delta_files import apply_delta, make_delta
    from llavar_peft.weights.delta.verify_delta import verify_delta

__version__ = "0.1.0"

__all__ = [
    "Chat",
    "CrossAttention",
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
    "Tiles",
    "Trainer",
    "__version__",
    "apply_delta",
    "bake_adapter",
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
    "parse_answer",
    "prepare_image",
    "projector_pretraining",
    "push_to_hub",
    "verify_delta",
]

_MODULES = {
    "DataConfig": "recipe.schema",
    "Full": "recipe.schema",
    "Lora": "recipe.schema",
    "ModelConfig": "recipe.schema",
    "OptimConfig": "recipe.schema",
    "ProbeConfig": "recipe.schema",
    "Projector": "recipe.schema",
    "Recipe": "recipe.schema",
    "Stage": "recipe.schema",
    "CrossAttention": "recipe.resolution",
    "Tiles": "recipe.resolution",
    "prepare_image": "data.image_preparation",
    "encode_record": "data.encode_record",
    "Chat": "inference.chat",
    "load_chat": "inference.chat",
    "parse_answer": "inference.chat",
    "load_adapter": "models.adapter_loading",
    "bake_adapter": "models.bake_adapter",
    "build_model": "models.build_model",
    "LlavarConfig": "models.llavar_config",
    "LlavarForConditionalGeneration": "models.modeling_llavar",
    "LlavarProcessor": "models.processing_llavar",
    "full_finetuning": "recipe.stages",
    "load_recipe": "recipe.presets",
    "lora": "recipe.stages",
    "projector_pretraining": "recipe.stages",
    "Trainer": "training.trainer",
    "push_to_hub": "hub.push_folder",
    "apply_delta": "weights.delta.delta_files",
    "make_delta": "weights.delta.delta_files",
    "export": "models.export_layout",
    "merge_adapter": "models.merge_adapter",
    "verify_delta": "weights.delta.verify_delta",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next access finds it without calling this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
