"""An adapter laid over a model: the right one, whole, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llavar_peft.errors import ConfigError, Fault, WeightsError
from llavar_peft.models.adapter_base_check import check_base_of_adapter
from llavar_peft.models.build import build_model, expected_shapes
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.recipe.schema import ModelConfig
from llavar_peft.weights.adapter.adapter_files import (
    ADAPTER_WEIGHTS,
    load_adapter_weights,
    read_adapter_table,
    read_settings,
)
from llavar_peft.weights.adapter.adapter_parts import find_base_faults, find_shape_faults, split_adapter
from llavar_peft.weights.io.tensor_blocks import find_not_finite, read_tensor

if TYPE_CHECKING:
    from peft import PeftModel


def load_adapter(
    base: LlavarForConditionalGeneration | ModelConfig | str | Path,
    folder: str | Path,
    *,
    trainable: bool = False,
    force: bool = False,
    device: str | torch.device | None = None,
) -> PeftModel:
    """Apply an adapter over the base it was trained on.

    Args:
        base: A model from ``build_model``, which is changed in place; or what to build: a ``ModelConfig``, or the
            folder of a checkpoint.
        folder: The adapter's.
        trainable: Whether what the adapter holds can be trained on; otherwise nothing can.
        force: Go on with a base of the right shape that the adapter was not trained on.
        device: Where a model that is built here goes, as in ``build_model``.

    Returns:
        The model with the adapter, in ``eval`` mode.

    Raises:
        ConfigError: No adapter, no checkpoint, or a model that has an adapter already.
        WeightsError: Another base, one with more or fewer layers, a tensor that does not land, is missing, damaged or
            not finite. A model that was given is then as it was.
    """
    adapter = Path(folder)
    if isinstance(base, (str, Path)):
        base = ModelConfig(checkpoint=str(base))
    if isinstance(base, ModelConfig):
        if not force:
            check_base_of_adapter(adapter, base)
        base, _ = build_model(base, device=device)
    elif not force:
        check_base_of_adapter(adapter, ModelConfig(checkpoint=base.name_or_path))
    return apply_adapter(base, adapter, trainable=trainable)


def apply_adapter(
    model: LlavarForConditionalGeneration, folder: Path, *, trainable: bool = False, name: str = "default"
) -> PeftModel:
    """Apply an adapter over a model of its shape, whatever the model's numbers are.

    Args:
        model: From ``build_model``; changed in place.
        folder: The adapter's.
        trainable: Whether it can be trained on.
        name: What peft is to call it.

    Returns:
        The model with the adapter, in ``eval`` mode.

    Raises:
        ConfigError: No adapter, or a model that has one already.
        WeightsError: As ``load_adapter`` says. The model is then as it was.
    """
    from peft import PeftConfig, get_peft_model

    if not isinstance(model, LlavarForConditionalGeneration) or hasattr(model, "peft_config"):
        raise ConfigError.at(
            "model", f"not a plain LLaVAR (got {type(model).__name__})", "give one from build_model, without adapters"
        )
    tensors = _read_fitting(model, folder)
    settings = PeftConfig.from_pretrained(str(folder))
    settings.inference_mode = not trainable
    settings.base_model_name_or_path = model.name_or_path
    model.requires_grad_(False)
    opened: Any = get_peft_model(model, settings, adapter_name=name)
    load_adapter_weights(opened, tensors, where=str(folder / ADAPTER_WEIGHTS), name=name)
    opened.eval()
    return opened


def add_adapter(model: PeftModel, folder: Path, name: str) -> None:
    """Apply a further adapter over a model that has one, for inference; the one that is on stays on.

    Args:
        model: From ``apply_adapter``; changed in place.
        folder: The adapter's.
        name: What peft is to call it.

    Raises:
        ConfigError: No adapter.
        WeightsError: As ``load_adapter`` says. The model is then as it was.
    """
    from peft import PeftConfig

    tensors = _read_fitting(model.get_base_model(), folder)
    settings = PeftConfig.from_pretrained(str(folder))
    settings.inference_mode = True
    settings.base_model_name_or_path = model.get_base_model().name_or_path
    model.add_adapter(name, settings)
    load_adapter_weights(model, tensors, where=str(folder / ADAPTER_WEIGHTS), name=name)
    model.eval()


def _read_fitting(model: LlavarForConditionalGeneration, folder: Path) -> dict[str, torch.Tensor]:
    settings, table = read_settings(folder), read_adapter_table(folder)
    parts = split_adapter(table)
    faults: list[Fault] = list(find_shape_faults(parts, settings, str(folder)))
    # The configuration's shapes, not the tensors' own: those of a quantized layer are packed.
    faults = faults or list(find_base_faults(parts, settings, expected_shapes(model.config), str(folder)))
    tensors = {} if faults else {name: read_tensor(entry) for name, entry in table.items()}
    found = (find_not_finite([tensor], table[name].location) for name, tensor in tensors.items())
    faults += [fault for fault in found if fault is not None]
    if faults:
        raise WeightsError("\n".join(map(str, faults)), faults)
    return tensors
