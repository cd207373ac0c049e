"""Reject checkpoints that bring code of their own: transformers would offer to run it, or download kernels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llavar_peft.errors import DAMAGED, ConfigError

_FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json",
    "preprocessor_config.json", "video_preprocessor_config.json", "image_processor_config.json", "adapter_config.json",
)  # fmt: skip
"""The files in which transformers and peft look for the names of modules and classes to import."""
CODE_KEYS = frozenset({"auto_map", "custom_pipelines", "custom_generate"})
_ATTENTION_KEYS = frozenset({"_attn_implementation", "attn_implementation", "_attn_implementation_internal"})
_DEEPEST = 20
"""Levels of nesting that are searched; transformers reads none that deep."""


def check_no_code(folder: Path) -> None:
    """Reject a folder whose settings name code to run: Python files (``auto_map``) or kernels on the hub.

    A file that cannot be parsed is left to the reader that needs it.

    Raises:
        ConfigError: Names the file and the key.
    """
    for name in _FILES:
        path = folder / name
        try:
            settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except DAMAGED:
            continue
        for key, value in _find_keys(settings, _DEEPEST):
            if (key in CODE_KEYS and value) or (key in _ATTENTION_KEYS and "/" in str(value)):
                raise ConfigError.at(
                    f"{path}:{key}",
                    f"the checkpoint brings code of its own (got {ascii(value)[:80]}), which is never run",
                    "remove the key if a standard class fits, or use a checkpoint without code",
                )


def _find_keys(value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    if depth == 0:
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _find_keys(inner, depth - 1)
    elif isinstance(value, list):
        for inner in value:
            yield from _find_keys(inner, depth - 1)
