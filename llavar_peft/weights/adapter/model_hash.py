"""A hash of a model's weights in 16 characters, independent of file names, folders and storage in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llavar_peft.constants import TUNED_TOWER
from llavar_peft.errors import ConfigError
from llavar_peft.weights.adapter.adapter_files import ADAPTER_CONFIG
from llavar_peft.weights.adapter.adapter_layouts import open_adapter
from llavar_peft.weights.delta.flat_settings import FLAT_TRAINED_TOWER
from llavar_peft.weights.delta.released_layout import read_model_config, read_tower_table, view_as_released
from llavar_peft.weights.io.hub_folders import find_folder
from llavar_peft.weights.io.tensor_table import read_tensor_table
from llavar_peft.weights.io.weights_fingerprint import FINGERPRINT_FILE, digest, read_fingerprint, take_fingerprint


def identify_model(model: str | Path, adapter: str | Path | None = None) -> str:
    """Compute the hash of a model's weights, without a vision tower that was never trained.

    Args:
        model: Folder of a checkpoint, an adapter or a run.
        adapter: Folder of an adapter that is applied to the model.

    Returns:
        The digest of a checkpoint's fingerprint, which ``adapter show`` prints for the base too; for an adapter, the
        digest of the fingerprints of base and adapter.

    Raises:
        ConfigError: The folder holds no model.
        WeightsError: A file cannot be read.
    """
    folder = _find_result(find_folder(model, "model"))
    if adapter is None and not (folder / ADAPTER_CONFIG).is_file():
        return digest(_fingerprint(folder) | _tuned_tower(folder))
    applied = find_folder(adapter, "adapter") if adapter is not None else folder
    # An adapter with a fingerprint knows its base, so that the hash is the same whether or not the base is given.
    known = read_fingerprint(applied / FINGERPRINT_FILE) or {}
    base, tower = known.get("base"), {name: known[name] for name in ("tower",) if name in known}
    if base is None and adapter is not None:
        base, tower = _fingerprint(folder), _tuned_tower(folder)
    return digest({"base": base, **tower, "adapter": take_fingerprint(open_adapter(applied).table, {})})


def _find_result(folder: Path) -> Path:
    """Return the model or adapter in a run's folder; another folder is returned as it is."""
    if not (folder / "config.json").is_file():
        for name in ("model", "adapter"):
            if (folder / name / "config.json").is_file():
                return folder / name
    return folder


def _tuned_tower(folder: Path) -> dict[str, Any]:
    """Return the fingerprint of a vision tower that was trained, under ``tower``."""
    config = read_model_config(folder)
    if not (config.get(TUNED_TOWER) or config.get(FLAT_TRAINED_TOWER)):
        return {}
    return {"tower": take_fingerprint(read_tower_table(folder), {})}


def _fingerprint(folder: Path) -> dict[str, Any]:
    try:
        view = view_as_released(folder)
    except ConfigError:  # stock LLaVA cannot be viewed in the released layout; its own names serve as well
        return take_fingerprint(read_tensor_table(folder), {})
    return take_fingerprint(view.table, view.config)
