"""The files of an adapter, in peft's format, and ``base.json``, which describes its base."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llavar_peft.errors import DAMAGED, ConfigError, Fault, describe_reason
from llavar_peft.types import expand_home
from llavar_peft.weights.adapter.adapter_settings import check_settings_types
from llavar_peft.weights.io.checkpoint_code import check_no_code
from llavar_peft.weights.io.tensor_blocks import check_tensors
from llavar_peft.weights.io.tensor_table import DOWNLOAD_AGAIN

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
BASE_FILE = "base.json"
"""In an adapter's folder: the ``ModelConfig`` of its base."""
QUANTIZED_FROM = "quantized_from"
"""The key of ``base.json`` for the dtype that the weights of a base in 4 bits had before."""
PREFIX = "base_model.model."
"""What peft puts before our tensor names."""
_FIX = "give the folder of an adapter"


@dataclass(frozen=True, slots=True)
class BaseSettings:
    """How the base of an adapter was configured in training.

    Attributes:
        fields: The fields of its ``ModelConfig``; empty for an adapter without ``base.json``.
        vision_tower: Folder of the tower, if it is not the base's own.
        projector: The stage-1 file that was applied to the base.
        quantize: How the base was quantized.
        dtype: Dtype of the weights before they were quantized, and of the computation.
        quantized_from: Dtype of the weights before they were quantized, for a base that is stored quantized.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    vision_tower: str | None = None
    projector: str | None = None
    quantize: Literal["nf4", "int8"] | None = None
    dtype: str = "auto"
    quantized_from: str | None = None


def read_base_settings(adapter: Path) -> BaseSettings:
    """Read ``base.json`` in an adapter's folder.

    Raises:
        ConfigError: The file is not readable.
    """
    path = adapter / BASE_FILE
    if not path.is_file():
        return BaseSettings()
    try:
        fields = dict(json.loads(path.read_text(encoding="utf-8")))
        if fields.get("quantize") not in (None, "nf4", "int8"):
            raise ValueError(f"quantize: got {fields['quantize']!r}, expected 'nf4', 'int8' or null")
        for name in ("vision_tower", "projector", "dtype", QUANTIZED_FROM):
            if not isinstance(fields.get(name), str | None):
                raise ValueError(f"{name}: got {ascii(fields[name])[:80]}, expected a text or null")
    except DAMAGED as error:
        raise ConfigError.at(
            str(path), f"not readable as settings of a base ({describe_reason(error)})", DOWNLOAD_AGAIN
        ) from error
    quantized_from = fields.pop(QUANTIZED_FROM, None)
    if quantized_from not in (None, "float32", "bfloat16", "float16"):
        what = f"not a dtype of weights (got {ascii(quantized_from)[:80]}, expected 'float32', 'bfloat16' or 'float16')"
        raise ConfigError.at(f"{path}:{QUANTIZED_FROM}", what, DOWNLOAD_AGAIN)
    return BaseSettings(
        fields=fields,
        vision_tower=fields.get("vision_tower"),
        projector=fields.get("projector"),
        quantize=fields.get("quantize"),
        dtype=fields.get("dtype") or "auto",
        quantized_from=quantized_from,
    )


def missing_projector(projector: str | Path, adapter: Path) -> Fault | None:
    """Return what is wrong if the projector file that an adapter was trained with is not at its path."""
    if expand_home(projector).exists():
        return None
    what = f"the projector file of the adapter's run does not exist (got {ascii(str(projector))[:200]})"
    return Fault(str(adapter / BASE_FILE), what, "give its new path with the option --projector of `llavar-peft merge`")


def read_settings(folder: Path) -> dict[str, Any]:
    """Read an adapter's ``adapter_config.json``.

    Raises:
        ConfigError: The folder holds no adapter, or the file is not readable.
    """
    path = folder / ADAPTER_CONFIG
    if folder.is_file():
        fix = f"give {str(folder.parent)!r}" if folder.with_name(ADAPTER_CONFIG).is_file() else _FIX
        raise ConfigError.at(str(folder), "a file, expected a folder", fix)
    check_no_code(folder)
    try:
        settings = dict(json.loads(path.read_text(encoding="utf-8")))
        if settings["peft_type"] == "LORA":
            check_settings_types(settings)
    except FileNotFoundError:
        what = "no such folder" if not folder.is_dir() else f"no {ADAPTER_CONFIG} in this folder"
        near = folder / "adapter"  # where a run writes it
        fix = f"did you mean {str(near)!r}?" if (near / ADAPTER_CONFIG).is_file() else _FIX
        raise ConfigError.at(str(folder), what, fix) from None
    except DAMAGED as error:
        raise ConfigError.at(
            str(path), f"not readable as settings of peft ({describe_reason(error)})", DOWNLOAD_AGAIN
        ) from error
    return settings


def scaling_of(module: str, settings: Mapping[str, Any]) -> tuple[int, float]:
    """Return rank and scale of a module's update.

    Args:
        module: Our name of the module.
        settings: From ``open_adapter``, which replaces patterns by names.

    Source: peft, tuners/lora/layer.py, ``update_layer``.
    """
    rank = int((settings.get("rank_pattern") or {}).get(module, settings["r"]))
    alpha = float((settings.get("alpha_pattern") or {}).get(module, settings["lora_alpha"]))
    return rank, alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def load_adapter_weights(model: Any, tensors: dict[str, Tensor], *, where: str, name: str = "default") -> None:
    """Copy an adapter's tensors into a ``PeftModel``.

    Args:
        model: Has adapters with the same settings.
        tensors: By peft's names.
        where: What to call them in messages.
        name: Name of the adapter in the model.

    Raises:
        WeightsError: A tensor is unexpected, missing or of another shape.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    with quiet_about_biases():
        expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    check_tensors(tensors, {name: tuple(tensor.shape) for name, tensor in expected.items()}, where=where)
    set_peft_model_state_dict(model, tensors, adapter_name=name)


@contextmanager
def quiet_about_biases() -> Iterator[None]:
    """Silence peft's warning that takes the one-dimensional biases of adapters for shards."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*lora_B\.bias:", module=r"peft\.")
        yield
