"""From records to batches. The names are loaded when they are first asked for, since torch takes seconds to import."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llavar_peft.data.images import prepare_image as prepare_image
    from llavar_peft.data.supervision import decode_supervision as decode_supervision
    from llavar_peft.data.tokenize import encode_conversation as encode_conversation
    from llavar_peft.data.tokenize import encode_record as encode_record

_HOMES = {
    "decode_supervision": "supervision",
    "encode_conversation": "tokenize",
    "encode_record": "tokenize",
    "prepare_image": "images",
}

__all__ = ["decode_supervision", "encode_conversation", "encode_record", "prepare_image"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
