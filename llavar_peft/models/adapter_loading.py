"""Load an adapter onto its base: the base, the shapes and every tensor are checked before the model is changed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llavar_peft.compat.dependency_internals import embed_used_rows_only
from llavar_peft.errors import ConfigError, Fault
from llavar_peft.models.build_model import build_model, expected_shapes
from llavar_peft.models.model_resolution import with_resolution_of
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.quantized_checkpoint import stored_fingerprint
from llavar_peft.models.tower_loading import read_tower
from llavar_peft.recipe.schema import ModelConfig
from llavar_peft.weights.adapter.adapter_files import ADAPTER_WEIGHTS, load_adapter_weights
from llavar_peft.weights.adapter.adapter_layouts import open_adapter
from llavar_peft.weights.adapter.adapter_parts import find_base_faults, find_shape_faults, split_adapter
from llavar_peft.weights.adapter.adapter_settings import peft_settings
from llavar_peft.weights.delta.released_layout import read_model_config, read_tower_table, view_as_released
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.hub_folders import find_folder, resolve_folder
from llavar_peft.weights.io.quantized_weights import UNQUANTIZED, UNQUANTIZED_TOWER
from llavar_peft.weights.io.stated_resolution import RESOLUTION, find_resolution_fault, resolution_kind
from llavar_peft.weights.io.tensor_blocks import find_not_finite, raise_faults, read_tensor
from llavar_peft.weights.io.weights_fingerprint import check_adapter_base, take_fingerprint

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

# How the names of the tensors begin that a stage-1 projector file replaces.
_REPLACED_BY_PROJECTOR = (
    tensor_names.RELEASED_PROJECTOR, tensor_names.RELEASED_EMBEDDINGS, tensor_names.RELEASED_NEWLINE,
    tensor_names.CROSS_ATTENTION,
)  # fmt: skip


def load_adapter(
    base: LlavarForConditionalGeneration | ModelConfig | str | Path,
    folder: str | Path,
    *,
    trainable: bool = False,
    force: bool = False,
    device: str | torch.device | None = None,
) -> PeftModel:
    """Load an adapter onto the base it was trained on.

    Args:
        base: A model from ``build_model``, which is changed in place; or a ``ModelConfig`` or checkpoint folder to
            build one from.
        folder: The adapter's.
        trainable: Whether the adapter's parameters can be trained; otherwise all parameters are frozen.
        force: Accept a base of the right shape that the adapter was not trained on.
        device: Of a model that is built here, as in ``build_model``.

    Returns:
        The model with the adapter, in ``eval`` mode.

    Raises:
        ConfigError: There is no adapter or no checkpoint, the model already has an adapter, or it has another
            resolution than the adapter was trained with.
        WeightsError: The base is another one or has another number of layers, or a tensor of the adapter is missing,
            unexpected, damaged or not finite. A given model is then unchanged.
    """
    adapter = find_folder(folder, "adapter")
    if isinstance(base, (str, Path)):
        base = ModelConfig(checkpoint=str(base))
    if isinstance(base, ModelConfig):
        base = with_resolution_of(base, [adapter])
        if not force:
            check_base_of_adapter(adapter, base)
        base, _ = build_model(base, device=device)
    elif not force:
        check_base_of_adapter(adapter, ModelConfig(checkpoint=base.name_or_path))
    return apply_adapter(base, adapter, trainable=trainable)


def apply_adapter(
    model: LlavarForConditionalGeneration, folder: Path, *, trainable: bool = False, name: str = "default"
) -> PeftModel:
    """Apply an adapter to a model in place, as ``load_adapter`` does, without checking that this is its base.

    Args:
        name: The adapter's name in peft.
    """
    from peft import get_peft_model

    if not isinstance(model, LlavarForConditionalGeneration) or hasattr(model, "peft_config"):
        raise ConfigError.at(
            "model",
            f"expected a LLaVAR without adapters (got {type(model).__name__})",
            "pass a model from build_model",
        )
    tensors, settings = _read_checked(model, folder)
    settings.inference_mode = not trainable
    settings.base_model_name_or_path = model.name_or_path
    model.requires_grad_(False)
    peft_model: Any = get_peft_model(model, settings, adapter_name=name)
    embed_used_rows_only(peft_model)
    load_adapter_weights(peft_model, tensors, where=str(folder / ADAPTER_WEIGHTS), name=name)
    peft_model.eval()
    return peft_model


def add_adapter(model: PeftModel, folder: Path, name: str) -> None:
    """Add another adapter to a model from ``apply_adapter``, in place and for inference; the active one stays active.

    Args:
        name: The adapter's name in peft.

    Raises:
        ConfigError: There is no adapter.
        WeightsError: As in ``load_adapter``. The model is then unchanged.
    """
    base = model.get_base_model()
    tensors, settings = _read_checked(base, folder)
    settings.inference_mode = True
    settings.base_model_name_or_path = base.name_or_path
    model.add_adapter(name, settings)
    embed_used_rows_only(model)
    load_adapter_weights(model, tensors, where=str(folder / ADAPTER_WEIGHTS), name=name)
    model.eval()


def check_base_of_adapter(adapter: Path, config: ModelConfig) -> None:
    """Reject a base that an adapter was not trained on. An adapter without a fingerprint cannot be checked.

    Raises:
        ConfigError: The base has another resolution.
        WeightsError: The base is another one; the message states the differences.
    """
    base = config.checkpoint or config.language_model or ""
    kind: str | None = None if config.resolution is None else config.resolution.type
    folder = find_folder(base, "model")
    if kind is None and (folder / "config.json").is_file():
        kind = resolution_kind(read_model_config(folder))
    _raise_fault(find_resolution_fault(adapter, kind))
    check_adapter_base(adapter, lambda: fingerprint_base(config), base)
    check_adapter_base(adapter, lambda: fingerprint_tower(config), config.vision_tower or base, role="tower")


@lru_cache(maxsize=8)
def fingerprint_base(config: ModelConfig) -> dict[str, Any]:
    """Take the fingerprint of the weights that a model is built from, without the vision tower.

    Args:
        config: With ``checkpoint`` or ``language_model``. Tensors that a ``projector`` replaces are left out.

    Returns:
        The fingerprint, as ``take_fingerprint`` returns it.

    Raises:
        ConfigError: A folder does not hold a model.
        WeightsError: A file cannot be read.
    """
    source = config.checkpoint or config.language_model or ""
    folder = resolve_folder(source, "model.checkpoint" if config.checkpoint else "model.language_model")
    replaced = _REPLACED_BY_PROJECTOR if config.projector is not None else ()
    if (stored := stored_fingerprint(folder, UNQUANTIZED)) is not None:
        tensors = {
            name: fingerprint for name, fingerprint in stored["tensors"].items() if not name.startswith(replaced)
        }
        return {**stored, "tensors": tensors}
    view = view_as_released(folder)
    table = {name: entry for name, entry in view.table.items() if not name.startswith(replaced)}
    return take_fingerprint(table, view.config)


@lru_cache(maxsize=8)
def fingerprint_tower(config: ModelConfig) -> dict[str, Any] | None:
    """Take the fingerprint of the vision tower that a model is built from; None if its source has none.

    Args:
        config: With a ``checkpoint`` that contains its tower, or with ``vision_tower``.

    Raises:
        ConfigError: A folder does not hold a tower.
        WeightsError: A file cannot be read.
    """
    if config.checkpoint is not None:
        folder = resolve_folder(config.checkpoint, "model.checkpoint")
        if (stored := stored_fingerprint(folder, UNQUANTIZED_TOWER)) is not None:
            return stored
        table = read_tower_table(folder)
        if table:
            return take_fingerprint(table, {})
    if config.vision_tower is None:
        return None
    return take_fingerprint(read_tower(resolve_folder(config.vision_tower, "model.vision_tower")).tensors, {})


def _raise_fault(fault: Fault | None) -> None:
    if fault is not None:
        raise ConfigError(str(fault), (fault,))


def _read_checked(model: LlavarForConditionalGeneration, folder: Path) -> tuple[dict[str, torch.Tensor], LoraConfig]:
    """Read an adapter's tensors, all of which fit the model and are finite, and its settings."""
    stored = open_adapter(folder)
    kind = resolution_kind({RESOLUTION: model.config.resolution})
    _raise_fault(find_resolution_fault(folder, kind, can_change=False))
    table = stored.table
    parts = split_adapter(table)
    raise_faults(list(find_shape_faults(parts, stored.settings, str(folder))))
    # The shapes come from the configuration, because a quantized layer's own tensor is packed.
    raise_faults(list(find_base_faults(parts, stored.settings, expected_shapes(model.config), str(folder))))
    tensors = {name: read_tensor(entry) for name, entry in table.items()}
    checks = (find_not_finite([tensor], table[name].location) for name, tensor in tensors.items())
    raise_faults([fault for fault in checks if fault is not None])
    return tensors, peft_settings(stored.settings, stored.adapted)
