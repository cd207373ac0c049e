"""What an adapter on disk is, and whether it is whole: read from its files, without building a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llavar_peft.constants import ADDED_TOKENS, ATTENTION_LAYERS, LINEAR_LAYERS, MLP_LAYERS
from llavar_peft.errors import Fault, WeightsError
from llavar_peft.weights.adapter.adapter_files import (
    ADAPTER_WEIGHTS,
    read_adapter_table,
    read_base_settings,
    read_settings,
    read_tensor,
)
from llavar_peft.weights.adapter.adapter_parts import (
    AdapterPart,
    Shape,
    find_base_faults,
    find_shape_faults,
    row_indices,
    scaling_of,
    split_adapter,
)
from llavar_peft.weights.base_check import FINGERPRINT_FILE, check_adapter_base
from llavar_peft.weights.delta.released_layout import ReleasedView, view_as_released
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.tensor_blocks import first_not_finite, tensor_location
from llavar_peft.weights.io.tensor_table import TensorEntry
from llavar_peft.weights.weights_fingerprint import digest, read_fingerprint, take_fingerprint

_GROUPS = {"all-linear": LINEAR_LAYERS, "attention": ATTENTION_LAYERS, "mlp": MLP_LAYERS}


@dataclass(frozen=True, slots=True)
class AdapterKind:
    """What an adapter holds for modules of one name, in all layers.

    Attributes:
        name: E.g. ``q_proj``.
        how: ``"low rank"``, ``"rows"`` or ``"in full"``.
        modules: How many.
        parameters: Their numbers.
        norm: Frobenius norm: of the updates s B A, their mean over the modules; else of the tensors themselves.
        largest: Of the updates, the largest.
    """

    name: str
    how: str
    modules: int
    parameters: int
    norm: float
    largest: float


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """What an adapter is.

    Attributes:
        folder: Where it lies.
        variant: ``"lora"``, ``"rslora"`` or ``"dora"``.
        rank: Of the updates.
        alpha: Their scale times the rank (times its root for rslora).
        target: The adapted layers: a group's name, or theirs.
        bias: Whether the updates have biases.
        tensors: How many.
        parameters: Their numbers.
        nbytes: Size of the file.
        dtypes: Of the tensors.
        base: What it is an adapter of: a ``ModelConfig``'s fields that are set.
        fingerprint: The base's, in short; None where it is not known.
        in_full: Modules that were trained in full.
        rows: Rows that were trained, by module.
        kinds: What it holds by kind of module.
    """

    folder: str
    variant: str
    rank: int
    alpha: float
    target: str
    bias: bool
    tensors: int
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]
    base: Mapping[str, Any]
    fingerprint: str | None
    in_full: tuple[str, ...]
    rows: Mapping[str, list[int]]
    kinds: tuple[AdapterKind, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class AdapterCheck:
    """What was found of an adapter that is sound.

    Attributes:
        tensors: How many.
        elements: Their numbers.
        checksums: Whether they were held against checksums.
        base: How the base was told: ``"fingerprint"``; ``"shapes"`` for an adapter that has none; None without a base.
    """

    tensors: int
    elements: int
    checksums: bool
    base: str | None


def describe_adapter(folder: str | Path) -> AdapterReport:
    """Say what an adapter is.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        What its files say.

    Raises:
        ConfigError: No adapter.
        WeightsError: Damaged, or not a LoRA adapter that makes sense.
    """
    path = Path(folder)
    settings, table = read_settings(path), read_adapter_table(path)
    parts = split_adapter(table)
    _raise(list(find_shape_faults(parts, settings, str(path))))
    prints = read_fingerprint(path / FINGERPRINT_FILE) or {}
    variant = "dora" if settings.get("use_dora") else "rslora" if settings.get("use_rslora") else "lora"
    return AdapterReport(
        folder=str(path),
        variant=variant,
        rank=int(settings["r"]),
        alpha=float(settings["lora_alpha"]),
        target=_target(parts),
        bias=bool(settings.get("lora_bias")),
        tensors=len(table),
        parameters=sum(entry.numel for entry in table.values()),
        nbytes=(path / ADAPTER_WEIGHTS).stat().st_size,
        dtypes=tuple(sorted({entry.dtype for entry in table.values()})),
        base={key: value for key, value in read_base_settings(path).items() if value is not None}
        or {"checkpoint": settings.get("base_model_name_or_path")},
        fingerprint=digest(prints["base"]) if "base" in prints else None,
        in_full=tuple(part.module for part in parts if part.whole),
        rows={part.module: row_indices(part, settings) for part in parts if "rows" in part.tensors},
        kinds=_kinds(parts, settings),
    )


def _target(parts: tuple[AdapterPart, ...]) -> str:
    found = {part.kind for part in parts if "A" in part.tensors}
    return next((group for group, layers in _GROUPS.items() if found == set(layers)), ", ".join(sorted(found)))


def _kinds(parts: tuple[AdapterPart, ...], settings: Mapping[str, Any]) -> tuple[AdapterKind, ...]:
    grouped: dict[tuple[str, str], list[AdapterPart]] = {}
    for part in parts:
        how = "in full" if part.whole else "rows" if "rows" in part.tensors else "low rank"
        grouped.setdefault((how, part.kind), []).append(part)
    order = {name: number for number, name in enumerate(LINEAR_LAYERS)}
    found = []
    for how, name in sorted(grouped, key=lambda key: (order.get(key[1], len(order)), key)):
        alike = grouped[how, name]
        norms = [_norm(part, settings) for part in alike]
        count = sum(part.parameters for part in alike)
        found.append(AdapterKind(name, how, len(alike), count, sum(norms) / len(norms), max(norms)))
    return tuple(found)


def _norm(part: AdapterPart, settings: Mapping[str, Any]) -> float:
    tensors = {role: read_tensor(entry).double() for role, entry in part.tensors.items()}
    if "A" not in tensors:
        return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors.values()))
    a, b = tensors["A"], tensors["B"]
    # |B A|^2 is the trace of (A A^T)(B^T B): matrices as large as the rank, not as the layer.
    square = float(((a @ a.T) * (b.T @ b)).sum())
    return scaling_of(part.module, settings)[1] * math.sqrt(max(0.0, square))


def verify_adapter(folder: str | Path, *, base: str | Path | None = None) -> AdapterCheck:
    """Read an adapter through, and holds it against its base.

    Args:
        folder: The adapter's.
        base: Folder of what it should fit: a checkpoint; for an adapter of a model from parts, the language model.

    Returns:
        What was found.

    Raises:
        ConfigError: No adapter, or no base.
        WeightsError: Names everything that is wrong: damaged tensors, numbers that are not finite, tensors that
            contradict the settings or do not land on the base, and a base with other numbers.
    """
    path = Path(folder)
    settings, table = read_settings(path), read_adapter_table(path)
    parts = split_adapter(table)
    faults = [*find_shape_faults(parts, settings, str(path)), *(fault for e in table.values() for fault in _damage(e))]
    told = None
    if base is not None:
        view = view_as_released(base)
        faults += find_base_faults(parts, settings, _shapes(view, parts), str(path))
        told = "shapes" if read_fingerprint(path / FINGERPRINT_FILE) is None else "fingerprint"
        try:
            check_adapter_base(path, lambda: take_fingerprint(view.table, view.config), str(base))
        except WeightsError as error:
            faults += error.faults
    _raise(faults)
    checked = all(entry.crc32 is not None for entry in table.values())
    return AdapterCheck(len(table), sum(entry.numel for entry in table.values()), checked, told)


def _damage(entry: TensorEntry) -> list[Fault]:
    try:
        fault = first_not_finite([read_tensor(entry)], tensor_location(entry))
    except WeightsError as error:
        return list(error.faults)
    return [] if fault is None else [fault]


def _shapes(view: ReleasedView, parts: tuple[AdapterPart, ...]) -> dict[str, Shape]:
    """Shapes of the base's tensors by our names; of a plain language model, as a LLaVAR made from it has them."""
    shapes = {
        new: entry.shape for name, entry in view.table.items() if (new := tensor_names.from_released(name)) is not None
    }
    if tensor_names.PROJECTOR_WEIGHT not in shapes:
        rows, width = shapes[tensor_names.EMBEDDINGS]
        shapes[tensor_names.EMBEDDINGS] = (rows + len(ADDED_TOKENS), width)
        # Its input is as wide as the tower, which is not part of a language model.
        own = [
            part.tensors["weight"].shape for part in parts if f"{part.module}.weight" == tensor_names.PROJECTOR_WEIGHT
        ]
        shapes[tensor_names.PROJECTOR_WEIGHT] = (width, *own[0][1:]) if own else (width, 0)
        shapes[tensor_names.PROJECTOR_BIAS] = (width,)
    return shapes


def _raise(faults: list[Fault]) -> None:
    if faults:
        raise WeightsError("\n".join(map(str, faults)), faults)
