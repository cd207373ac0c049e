"""Description and verification of an adapter on disk, from its files, without building a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llavar_peft.constants import ADDED_TOKENS, ATTENTION_LAYERS, LINEAR_LAYERS, MLP_LAYERS
from llavar_peft.errors import WeightsError
from llavar_peft.types import ReadableRepr
from llavar_peft.weights.adapter.adapter_files import missing_projector, read_base_settings, scaling_of
from llavar_peft.weights.adapter.adapter_layouts import open_adapter
from llavar_peft.weights.adapter.adapter_parts import (
    AdapterPart,
    Shape,
    find_base_faults,
    find_shape_faults,
    row_indices,
    split_adapter,
)
from llavar_peft.weights.delta.released_layout import ReleasedView, read_tower_table, view_as_released
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.stated_resolution import find_resolution_fault, resolution_kind
from llavar_peft.weights.io.tensor_blocks import find_damage, raise_faults, read_tensor
from llavar_peft.weights.io.tensor_table import TensorEntry
from llavar_peft.weights.io.weights_fingerprint import (
    FINGERPRINT_FILE,
    check_adapter_base,
    digest,
    read_fingerprint,
    take_fingerprint,
)

_GROUPS = {"all-linear": LINEAR_LAYERS, "attention": ATTENTION_LAYERS, "mlp": MLP_LAYERS}


@dataclass(frozen=True, slots=True)
class AdapterKind:
    """The part of an adapter for modules of one name, in all layers.

    Attributes:
        name: E.g. ``q_proj``; for a layer of the vision tower ``vision_tower q_proj``.
        how: ``"low rank"``, ``"rows"`` or ``"in full"``.
        modules: Number of modules.
        parameters: Number of parameters.
        norm: Mean over the modules of the Frobenius norm of the updates s B A, or of the tensors themselves.
        largest: The largest of these norms.
    """

    name: str
    how: str
    modules: int
    parameters: int
    norm: float
    largest: float


@dataclass(frozen=True, slots=True, repr=False)
class AdapterReport(ReadableRepr):
    """Description of an adapter.

    Attributes:
        folder: Its folder.
        variant: ``"lora"``, ``"rslora"`` or ``"dora"``.
        rank: Rank of the updates.
        tower_rank: Rank of the updates of the vision tower; None without any.
        alpha: Scale of the updates times the rank (times its square root for rslora).
        target: The adapted layers: the name of a group, or their own names.
        bias: Whether the updates have biases.
        tensors: Number of tensors.
        parameters: Number of parameters.
        nbytes: Size of its files of tensors.
        dtypes: Dtypes of the tensors.
        base: The fields of its base's ``ModelConfig`` that are set.
        fingerprint: Digest of the base's fingerprint; None if it is not known.
        tower_fingerprint: That of the base's vision tower; None if the tower was not trained, by the adapter or before.
        in_full: Modules that were trained in full.
        rows: Rows that were trained, by module.
        kinds: Its parts by kind of module.
    """

    folder: str
    variant: str
    rank: int
    tower_rank: int | None
    alpha: float
    target: str
    bias: bool
    tensors: int
    parameters: int
    nbytes: int
    dtypes: tuple[str, ...]
    base: Mapping[str, Any]
    fingerprint: str | None
    tower_fingerprint: str | None
    in_full: tuple[str, ...]
    rows: Mapping[str, list[int]]
    kinds: tuple[AdapterKind, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class AdapterCheck:
    """Result of verifying a valid adapter.

    Attributes:
        tensors: Number of tensors.
        elements: Number of elements.
        checksums: Whether checksums were compared.
        base: How the base was recognized: ``"fingerprint"``; ``"shapes"`` for an adapter without one; None if no base
            was given.
    """

    tensors: int
    elements: int
    checksums: bool
    base: str | None


def describe_adapter(folder: str | Path) -> AdapterReport:
    """Describe an adapter.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ConfigError: No adapter.
        WeightsError: The adapter is damaged, or is not a valid LoRA adapter.
    """
    stored = open_adapter(folder)
    path, settings, table = stored.folder, stored.settings, stored.table
    parts = split_adapter(table)
    raise_faults(list(find_shape_faults(parts, settings, str(path))))
    prints = read_fingerprint(path / FINGERPRINT_FILE) or {}
    variant = "dora" if settings.get("use_dora") else "rslora" if settings.get("use_rslora") else "lora"
    return AdapterReport(
        folder=str(path),
        variant=variant,
        rank=int(settings["r"]),
        tower_rank=next((scaling_of(part.module, settings)[0] for part in parts if _is_tower_update(part)), None),
        alpha=float(settings["lora_alpha"]),
        target=_describe_target(parts),
        bias=bool(settings.get("lora_bias")),
        tensors=len(table),
        parameters=sum(entry.numel for entry in table.values()),
        nbytes=sum(file.stat().st_size for file in {entry.path for entry in table.values()}),
        dtypes=tuple(sorted({entry.dtype for entry in table.values()})),
        base={key: value for key, value in read_base_settings(path).fields.items() if value is not None}
        or {"checkpoint": settings.get("base_model_name_or_path")},
        fingerprint=digest(prints["base"]) if "base" in prints else None,
        tower_fingerprint=digest(prints["tower"]) if "tower" in prints else None,
        in_full=tuple(part.module for part in parts if part.in_full),
        rows={part.module: row_indices(part, settings) for part in parts if "rows" in part.tensors},
        kinds=_describe_kinds(parts, settings),
    )


def _describe_target(parts: tuple[AdapterPart, ...]) -> str:
    """Return the name of the group of layers that have updates, or their own names."""
    adapted = {part.kind for part in parts if "A" in part.tensors and not _is_tower_update(part)}
    return next((group for group, layers in _GROUPS.items() if adapted == set(layers)), ", ".join(sorted(adapted)))


def _is_tower_update(part: AdapterPart) -> bool:
    return part.module.startswith(tensor_names.TOWER) and "A" in part.tensors


def _describe_kinds(parts: tuple[AdapterPart, ...], settings: Mapping[str, Any]) -> tuple[AdapterKind, ...]:
    """Group an adapter's parts by kind of module, in the order of a layer's modules, and measure their updates."""
    grouped: dict[tuple[str, str], list[AdapterPart]] = {}
    for part in parts:
        how = "in full" if part.in_full else "rows" if "rows" in part.tensors else "low rank"
        kind = f"vision_tower {part.kind}" if part.module.startswith(tensor_names.TOWER) else part.kind
        grouped.setdefault((how, kind), []).append(part)
    order = {name: number for number, name in enumerate(LINEAR_LAYERS)}
    kinds = []
    for how, name in sorted(grouped, key=lambda key: (order.get(key[1], len(order)), key)):
        group = grouped[how, name]
        norms = [_norm(part, settings) for part in group]
        count = sum(part.parameters for part in group)
        kinds.append(AdapterKind(name, how, len(group), count, sum(norms) / len(norms), max(norms)))
    return tuple(kinds)


def _norm(part: AdapterPart, settings: Mapping[str, Any]) -> float:
    """Return the Frobenius norm of a part's update, or of its tensors where it replaces those of the base."""
    tensors = {role: read_tensor(entry).double() for role, entry in part.tensors.items()}
    if "A" not in tensors:
        return math.sqrt(sum(float(tensor.square().sum()) for tensor in tensors.values()))
    a, b = tensors["A"], tensors["B"]
    # |B A|^2 is the trace of (A A^T)(B^T B): matrices as large as the rank, not as the layer.
    square = float(((a @ a.T) * (b.T @ b)).sum())
    return scaling_of(part.module, settings)[1] * math.sqrt(max(0.0, square))


def verify_adapter(folder: str | Path, *, base: str | Path | None = None) -> AdapterCheck:
    """Read all tensors of an adapter, and check them, against its base too if it is given.

    Args:
        folder: The adapter's folder.
        base: Folder of its base: a checkpoint; for an adapter of a model from parts, the language model.

    Raises:
        ConfigError: No adapter, or no base.
        WeightsError: Names everything that is wrong: damaged tensors, NaN and infinite elements, tensors that
            contradict the settings or do not fit the base, and a base with other values.
    """
    stored = open_adapter(folder)
    path, settings, table = stored.folder, stored.settings, stored.table
    parts = split_adapter(table)
    faults = list(find_shape_faults(parts, settings, str(path)))
    faults += [fault for entry in table.values() for fault in find_damage(entry)]
    method = None
    if base is not None:
        view = view_as_released(base)
        tower = read_tower_table(view.folder)
        if not faults:
            # A language model, or a LLaVAR in the released layout, has no tower to compare the adapter with.
            checked = parts if tower else tuple(part for part in parts if not _is_tower_update(part))
            faults += find_base_faults(checked, settings, _base_shapes(view, checked, tower), str(path))
        projector = read_base_settings(path).projector
        resolution_fault = find_resolution_fault(path, resolution_kind(view.config))
        projector_fault = None if projector is None else missing_projector(projector, path)
        faults += [fault for fault in (resolution_fault, projector_fault) if fault is not None]
        method = "shapes" if read_fingerprint(path / FINGERPRINT_FILE) is None else "fingerprint"
        try:
            check_adapter_base(path, lambda: take_fingerprint(view.table, view.config), str(base))
            check_adapter_base(path, lambda: take_fingerprint(tower, {}) if tower else None, str(base), role="tower")
        except WeightsError as error:
            faults += error.faults
    raise_faults(faults)
    checksums = all(entry.crc32 is not None for entry in table.values())
    return AdapterCheck(len(table), sum(entry.numel for entry in table.values()), checksums, method)


def _base_shapes(
    view: ReleasedView, parts: tuple[AdapterPart, ...], tower: Mapping[str, TensorEntry]
) -> dict[str, Shape]:
    """Return the base's shapes by our names; for a plain language model, those of a LLaVAR made from it."""
    shapes = {
        our_name: entry.shape
        for name, entry in view.table.items()
        if (our_name := tensor_names.from_released(name)) is not None
    }
    if any(part.module.startswith(tensor_names.TOWER) for part in parts):
        shapes.update({name: entry.shape for name, entry in tower.items()})
    in_full = {
        f"{part.module}.{role}": entry.shape for part in parts if part.in_full for role, entry in part.tensors.items()
    }
    shapes.update({name: shape for name, shape in in_full.items() if name.startswith(tensor_names.CROSS_ATTENTION)})
    if tensor_names.NEWLINE in in_full:  # the base gets it from the adapter
        shapes.setdefault(tensor_names.NEWLINE, shapes[tensor_names.EMBEDDINGS][1:])
    if not any(name.startswith(tensor_names.PROJECTOR) and name.endswith("weight") for name in shapes):
        rows, width = shapes[tensor_names.EMBEDDINGS]
        shapes[tensor_names.EMBEDDINGS] = (rows + len(ADDED_TOKENS), width)
        # The width of its input is that of the tower, which is not part of a language model.
        weights = [name for name in in_full if name.startswith(tensor_names.PROJECTOR) and name.endswith("weight")]
        for name in weights or [tensor_names.PROJECTOR_WEIGHT]:
            shapes[name] = (width, *in_full.get(name, (width, 0))[1:])
            shapes[name.removesuffix("weight") + "bias"] = (width,)
    return shapes
