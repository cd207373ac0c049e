"""Asking a trained model. Imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llavar_peft.inference.reader import Reader, load_reader

__all__ = ["Reader", "load_reader"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llavar_peft.inference import reader

    return getattr(reader, name)


def __dir__() -> list[str]:
    return __all__
