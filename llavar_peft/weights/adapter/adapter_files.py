"""An adapter on disk, as ``peft`` writes it, with what it is an adapter of."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.errors import ConfigError
from llavar_peft.weights.io.check_tensors import check_tensors
from llavar_peft.weights.io.open_weights import open_weights
from llavar_peft.weights.io.tensor_blocks import read_blocks
from llavar_peft.weights.io.tensor_table import TensorEntry, read_file_tensor_table

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
BASE_FILE = "base.json"
"""Beside an adapter: the ``ModelConfig`` of what it is an adapter of."""


def read_settings(folder: Path) -> dict[str, Any]:
    """Read an adapter's ``adapter_config.json``.

    Args:
        folder: The adapter's.

    Returns:
        Its content, with at least ``peft_type``.

    Raises:
        ConfigError: No adapter, or not readable.
    """
    path = folder / ADAPTER_CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        _ = settings["peft_type"]
    except FileNotFoundError:
        what = "no such folder" if not folder.is_dir() else f"no {ADAPTER_CONFIG} in it"
        raise ConfigError.at(str(folder), what, "give an adapter's folder") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError.at(
            str(path), f"not readable as peft's settings ({error!r})", "fetch the file again"
        ) from error
    return dict(settings)


def read_base_settings(folder: Path) -> dict[str, Any]:
    """Read what an adapter says of its base: a ``ModelConfig``'s fields; empty where it says nothing."""
    path = folder / BASE_FILE
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError.at(str(path), f"not readable as a base's settings ({error})", "fetch it again") from error


def read_adapter_table(folder: Path) -> dict[str, TensorEntry]:
    """Read which tensors an adapter holds, with their checksums where it has any.

    Args:
        folder: The adapter's.

    Returns:
        Where they lie, by peft's names.

    Raises:
        ConfigError: There is no such file.
        WeightsError: It is cut off or no safetensors.
    """
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise ConfigError.at(str(folder), f"no {ADAPTER_WEIGHTS} in it", "give an adapter's folder")
    return read_file_tensor_table(path)


def read_tensor(entry: TensorEntry) -> Tensor:
    """Read a tensor whole; refuses one whose bytes are not those that its checksum was taken of."""
    import torch

    blocks = list(read_blocks(entry))
    return (torch.cat(blocks) if blocks else torch.empty(0)).reshape(entry.shape)


def load_adapter_weights(model: Any, tensors: dict[str, Tensor], *, where: str, name: str = "default") -> None:
    """Copy an adapter's tensors into a ``PeftModel``.

    Args:
        model: With adapters of the same settings in place.
        tensors: By peft's names.
        where: What to call them.
        name: The adapter's in the model.

    Raises:
        WeightsError: One that has no place, one that is missing, or one of another shape.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    with quiet_about_biases():
        expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    check_tensors(tensors, {name: tuple(tensor.shape) for name, tensor in expected.items()}, where=where)
    set_peft_model_state_dict(model, tensors, adapter_name=name)


def open_adapter_weights(folder: Path) -> dict[str, Tensor]:
    """An adapter's tensors, mapped from disk and unchecked."""
    return dict(open_weights(folder / ADAPTER_WEIGHTS))


@contextmanager
def quiet_about_biases() -> Iterator[None]:
    """Keep peft from taking the biases of adapters, which have one dimension, for shards."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*lora_B\.bias:", module=r"peft\.")
        yield
