"""Training: a recipe's stages on ``transformers.Trainer``. Imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llavar_peft.training.trainer import Trainer, run_recipe

__all__ = ["Trainer", "run_recipe"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llavar_peft.training import trainer

    return getattr(trainer, name)


def __dir__() -> list[str]:
    return __all__
