"""An adapter on disk, as ``peft`` writes it, with what it is an adapter of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.errors import WeightsError
from llavar_peft.weights.store import open_weights

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
BASE_FILE = "base.json"
"""Beside an adapter: the ``ModelConfig`` of what it is an adapter of."""


def load_adapter_weights(model: Any, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Copies an adapter's tensors into a ``PeftModel`` of the same shape; each must land.

    Args:
        model: The ``PeftModel``.
        folder: The adapter's.
        tensors: Instead of those on disk.

    Raises:
        WeightsError: A tensor is missing or extra.
    """
    from peft import set_peft_model_state_dict

    stored = dict(open_weights(folder / ADAPTER_WEIGHTS) if tensors is None else tensors)
    result = set_peft_model_state_dict(model, stored)
    missing = [name for name in result.missing_keys if "lora_" in name or "modules_to_save" in name]
    if missing or result.unexpected_keys:
        raise WeightsError.at(
            str(folder / ADAPTER_WEIGHTS),
            f"the adapter does not fit (missing {missing[:4]}, unexpected {list(result.unexpected_keys)[:4]})",
            "use it on the base it was trained on",
        )
