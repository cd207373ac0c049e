"""Which weights were asked, in 16 letters that stay the same when files are renamed, moved, or stored in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llavar_peft.errors import ConfigError
from llavar_peft.weights.adapter.adapter_files import ADAPTER_CONFIG, read_adapter_table
from llavar_peft.weights.base_check import FINGERPRINT_FILE
from llavar_peft.weights.delta.released_layout import view_as_released
from llavar_peft.weights.io.tensor_table import read_tensor_table
from llavar_peft.weights.weights_fingerprint import digest, read_fingerprint, take_fingerprint


def identify_model(model: str | Path, adapter: str | Path | None = None) -> str:
    """Take the hash of a model's weights; the vision tower, which is never trained, does not enter.

    Args:
        model: What ``load_reader`` was given: a checkpoint's folder, an adapter's, or a run's.
        adapter: Laid over it.

    Returns:
        For a checkpoint the digest of its fingerprint, which ``adapter show`` gives of a base too; with an adapter that
        of both.

    Raises:
        ConfigError: The folder holds no model.
        WeightsError: A file cannot be read.
    """
    folder = _result_of(Path(model))
    if adapter is None and not (folder / ADAPTER_CONFIG).is_file():
        return digest(_of_checkpoint(folder))
    laid = Path(adapter) if adapter is not None else folder
    # An adapter knows its base, and is never laid over another; so that naming the base changes nothing.
    base = (read_fingerprint(laid / FINGERPRINT_FILE) or {}).get("base")
    if base is None and adapter is not None:
        base = _of_checkpoint(folder)
    return digest({"base": base, "adapter": take_fingerprint(read_adapter_table(laid), {})})


def _result_of(folder: Path) -> Path:
    """A run's folder stands for its result, as it does for ``load_reader``."""
    if not (folder / "config.json").is_file():
        for name in ("model", "adapter"):
            if (folder / name / "config.json").is_file():
                return folder / name
    return folder


def _of_checkpoint(folder: Path) -> dict[str, Any]:
    try:
        view = view_as_released(folder)
    except ConfigError:  # stock LLaVA has no released layout; its tensors by its own names tell as much
        return take_fingerprint(read_tensor_table(folder), {})
    return take_fingerprint(view.table, view.config)
