"""Asking a trained model. Imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llavar_peft.inference.chat import Chat, load_chat
    from llavar_peft.inference.dialogue import Dialogue
    from llavar_peft.inference.reader import Reader, load_reader
    from llavar_peft.inference.requests import Answer, Picture, Request, Sampling

_HOMES = {
    "Answer": "requests",
    "Chat": "chat",
    "Dialogue": "dialogue",
    "Picture": "requests",
    "Reader": "reader",
    "Request": "requests",
    "Sampling": "requests",
    "load_chat": "chat",
    "load_reader": "reader",
}
__all__ = ["Answer", "Chat", "Dialogue", "Picture", "Reader", "Request", "Sampling", "load_chat", "load_reader"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
