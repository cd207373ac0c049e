"""The model, its configuration, its processor, and how they are built. Imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llavar_peft.models.build import build_model
    from llavar_peft.models.configuration import LlavarConfig
    from llavar_peft.models.modeling import LlavarForConditionalGeneration, LlavarModel
    from llavar_peft.models.processing import LlavarProcessor
    from llavar_peft.models.registration import register

_HOME = {
    "LlavarConfig": "configuration",
    "LlavarForConditionalGeneration": "modeling",
    "LlavarModel": "modeling",
    "LlavarProcessor": "processing",
    "build_model": "build",
    "register": "registration",
}
__all__ = [
    "LlavarConfig",
    "LlavarForConditionalGeneration",
    "LlavarModel",
    "LlavarProcessor",
    "build_model",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
