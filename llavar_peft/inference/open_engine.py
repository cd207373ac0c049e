"""A model ready to be asked: from one of our folders, a released one, a run's, or an adapter's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from llavar_peft.errors import ConfigError
from llavar_peft.inference.engine import Engine
from llavar_peft.models.adapter_loading import add_adapter, apply_adapter, check_base_of_adapter
from llavar_peft.models.build_model import build_model
from llavar_peft.recipe.schema import Attention, Dtype, ModelConfig, Quantization
from llavar_peft.weights.adapter.adapter_files import ADAPTER_CONFIG, BASE_FILE, read_base_settings, read_settings


def open_engine(
    model: str | Path,
    adapters: Mapping[str, str | Path],
    *,
    vision_tower: str | None = None,
    quantize: Quantization | None = None,
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    device: str = "auto",
) -> Engine:
    """Open a model once, with any number of adapters over it.

    Args:
        model: A checkpoint's folder, ours or in the released layout; an adapter's, whose base is then opened; or a
            run's, which stands for its result.
        adapters: Adapters' folders by the names that they are to have.
        vision_tower: Where the tower is, for a checkpoint in the released layout.
        quantize: How the language model's linear layers are stored; None leaves an adapter's base as it was trained on.
        dtype: Of the weights; ``auto`` is bfloat16 on a GPU that has it, else float32.
        attention: Its implementation.
        device: ``auto`` is a GPU where there is one, then Apple's, which cannot hold quantized weights, then the CPU.

    Returns:
        The model in ``eval`` mode, the first adapter on.

    Raises:
        ConfigError: The folder holds no model, or names a base that is not there; or the adapters were trained on bases
            stored in different ways.
        WeightsError: Weights that do not fit.
    """
    model = _inside_run(Path(model))
    folders = {name: _inside_run(Path(folder)) for name, folder in adapters.items()}
    if not folders and (model / ADAPTER_CONFIG).is_file():
        folders = {model.name: model}
        base = _base_of(model)
    else:
        base = ModelConfig(checkpoint=str(model), vision_tower=vision_tower)
    if quantize is None:
        quantize = _stored_as(folders)
    place = _choose_device(device, quantize)
    if dtype == "auto" and not place.startswith("cuda"):
        dtype = "float32"  # also where there is a GPU that is not asked for
    config = dataclasses.replace(base, quantize=quantize, dtype=dtype, attention=attention)
    for folder in folders.values():
        check_base_of_adapter(folder, config)
    built, processor = build_model(config, device=place)
    built.eval()
    # peft puts an adapter's name into module names, which must not hold a dot; the first has peft's own.
    inner = {f"adapter_{number}" if number else "default": name for number, name in enumerate(folders)}
    if not folders:
        return Engine(built, processor)
    # Those with rows of their own go last: peft 0.21 cannot read the state of an adapter without, beside one with rows
    # (peft/utils/other.py, ``TrainableTokensWrapper.adapter_state_dict``).
    first, *others = sorted(zip(inner, folders.values(), strict=True), key=lambda pair: _has_rows(pair[1]))
    wrapped = apply_adapter(built, first[1], name=first[0])
    for name, folder in others:
        add_adapter(wrapped, folder, name)
    return Engine(wrapped, processor, inner)


def _has_rows(adapter: Path) -> bool:
    return bool(read_settings(adapter).get("trainable_token_indices"))


def _inside_run(folder: Path) -> Path:
    """A run's folder stands for its result."""
    if folder.is_dir() and not (folder / "config.json").is_file():
        for name in ("model", "adapter"):
            if (folder / name / "config.json").is_file():
                return folder / name
    return folder


def _base_of(adapter: Path) -> ModelConfig:
    settings = read_base_settings(adapter).fields
    if not settings:
        raise ConfigError.at(str(adapter / BASE_FILE), "no such file", "give the adapter's base as --model as well")
    base = ModelConfig(**settings)
    if base.checkpoint is None or Path(base.checkpoint).is_dir():
        return base
    # A run's folder may have been moved as a whole: the base then lies where it lay, seen from the adapter.
    old = Path(base.checkpoint)
    for moved in (adapter.parent / old.parent.name / old.name, adapter.parent / old.name):
        if moved.is_dir():
            return dataclasses.replace(base, checkpoint=str(moved))
    raise ConfigError.at(
        str(adapter / BASE_FILE), f"its base is not there (got {base.checkpoint!r})", "give the base as --model as well"
    )


def _stored_as(adapters: Mapping[str, Path]) -> Quantization | None:
    """How the adapters' bases were stored when they were trained."""
    known: dict[str, Quantization | None] = {
        name: read_base_settings(folder).quantize for name, folder in adapters.items()
    }
    if len(set(known.values())) > 1:
        ways = ", ".join(f"{name} on {quantize or 'full precision'}" for name, quantize in known.items())
        raise ConfigError.at(
            "adapters", f"were trained on bases stored differently ({ways})", "choose with --quantize, or load fewer"
        )
    return next(iter(known.values()), None)


def _choose_device(device: str, quantize: Quantization | None) -> str:
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() and quantize is None else "cpu"
    if quantize is not None and device.startswith("mps"):
        raise ConfigError.at(
            "device", f"{quantize} weights cannot be on {device}", "use cuda or cpu, or do not quantize"
        )
    return device
