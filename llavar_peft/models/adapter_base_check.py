"""What an adapter was trained on, and whether a base is that."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from llavar_peft.models.checkpoint_loading import resolve_folder
from llavar_peft.recipe.schema import ModelConfig
from llavar_peft.weights.delta.released_layout import view_as_released
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.weights_fingerprint import check_adapter_base, take_fingerprint

_OVERLAID = (
    tensor_names.RELEASED_PROJECTOR_WEIGHT,
    tensor_names.RELEASED_PROJECTOR_BIAS,
    tensor_names.RELEASED_EMBEDDINGS,
)


@lru_cache(maxsize=8)
def fingerprint_base(config: ModelConfig) -> dict[str, Any]:
    """Take the fingerprint of what a model is built from, the tower left out.

    Args:
        config: With ``checkpoint`` or ``language_model``. What a ``projector`` lays over is left out.

    Returns:
        The fingerprint, as ``weights.fingerprint.take_fingerprint`` gives it.

    Raises:
        ConfigError: A folder is not what it should be.
        WeightsError: A file cannot be read.
    """
    named = config.checkpoint or config.language_model or ""
    view = view_as_released(resolve_folder(named, "model.checkpoint" if config.checkpoint else "model.language_model"))
    overlaid = _OVERLAID if config.projector is not None else ()
    table = {name: entry for name, entry in view.table.items() if name not in overlaid}
    return take_fingerprint(table, view.config)


def check_base_of_adapter(adapter: Path, config: ModelConfig) -> None:
    """Reject a base that an adapter was not trained on. An adapter without a fingerprint tells nothing.

    Args:
        adapter: Its folder.
        config: Names the base.

    Raises:
        WeightsError: Another base; says what gave it away.
    """
    check_adapter_base(adapter, lambda: fingerprint_base(config), config.checkpoint or config.language_model or "")
