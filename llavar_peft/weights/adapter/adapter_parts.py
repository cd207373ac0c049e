"""An adapter's tensors by module, and whether they agree with its settings and with a base.

Only headers are read, and no model is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llavar_peft.errors import Fault
from llavar_peft.weights.adapter.adapter_files import PREFIX, scaling_of
from llavar_peft.weights.adapter.adapter_settings import target_names
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.tensor_blocks import join_first
from llavar_peft.weights.io.tensor_table import TensorEntry

_OTHER_BASE = "use the adapter with the base it was trained on"
_SAVE_AGAIN = "save the adapter again with peft"
_ROLES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
    ".token_adapter.trainable_tokens_delta": "rows",
}
_OPTIONAL = {"bias": "lora_bias", "magnitude": "use_dora"}
"""Roles of an update that depend on a setting."""
# Settings that change the meaning of the tensors in ways that are not implemented here.
_UNSUPPORTED = (
    "fan_in_fan_out", "layer_replication", "target_parameters", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "megatron_config", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip
_SHOWN = 6  # layers in a message

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """The tensors of an adapter for one module of its base.

    Attributes:
        module: Name of the module in our model, e.g. ``model.language_model.layers.0.mlp.up_proj``.
        tensors: By role: ``A``, ``B``, ``bias`` and ``magnitude`` of a low-rank update; ``rows`` of an embedding; or,
            for a module that was trained in full, its tensors by their own names (``weight``, ``bias``).
        in_full: Whether the module was trained in full.
    """

    module: str
    tensors: Mapping[str, TensorEntry]
    in_full: bool

    @property
    def kind(self) -> str:
        """The last part of the module's name, which is the same in each layer."""
        return self.module.rsplit(".", 1)[-1]

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(entry.numel for entry in self.tensors.values())


def split_adapter(table: Mapping[str, TensorEntry]) -> tuple[AdapterPart, ...]:
    """Sort an adapter's tensors, given by peft's names, into one part for each module."""
    tensors_by_module: dict[tuple[str, bool], dict[str, TensorEntry]] = {}
    for name, entry in table.items():
        our_name = name.removeprefix(PREFIX)
        suffix = next((suffix for suffix in _ROLES if our_name.endswith(suffix)), None)
        if suffix is not None:
            module, in_full, role = our_name.removesuffix(suffix), False, _ROLES[suffix]
        else:
            module, _, role = our_name.rpartition(".")
            in_full = True
        tensors_by_module.setdefault((module, in_full), {})[role] = entry
    return tuple(AdapterPart(module, tensors, in_full) for (module, in_full), tensors in tensors_by_module.items())


def find_shape_faults(parts: Sequence[AdapterPart], settings: Mapping[str, Any], where: str) -> Iterator[Fault]:
    """Yield a fault for each contradiction between an adapter's tensors and its settings.

    Args:
        parts: From ``split_adapter``.
        settings: The adapter's ``adapter_config.json``.
        where: What to call the adapter in messages.
    """
    unsupported = _find_kind_fault(parts, settings, where)
    if unsupported is not None:
        yield unsupported
        return
    if not any("A" in part.tensors for part in parts):
        yield Fault(where, "the adapter has no low-rank updates", _SAVE_AGAIN)
    saved = tuple(settings.get("modules_to_save") or ())
    for module in saved:
        if not any(part.in_full and module in part.module.split(".") for part in parts):
            yield Fault(where, f"{module} was trained in full, but its tensors are missing", _SAVE_AGAIN)
    if settings.get("trainable_token_indices") and not any("rows" in part.tensors for part in parts):
        yield Fault(where, "rows of the embeddings were trained, but they are missing", _SAVE_AGAIN)
    adapted = [part.module for part in parts if "A" in part.tensors]
    selected = set(target_names(settings, adapted, where))
    unselected = [module for module in adapted if module not in selected]
    if unselected:
        what = (
            f"{len(unselected)} modules have updates, and target_modules does not select them: {join_first(unselected)}"
        )
        yield Fault(where, what, _SAVE_AGAIN)
    yield from _find_layer_faults(adapted, settings, where)
    for part in parts:
        contradiction = _check_part(part, settings, saved)
        if contradiction is not None:
            yield Fault(f"{where}:{part.module}", contradiction, _SAVE_AGAIN)


def _find_layer_faults(adapted: Sequence[str], settings: Mapping[str, Any], where: str) -> Iterator[Fault]:
    """Yield a fault if layers have updates that the settings do not name."""
    stated = _chosen_layers(settings)
    unstated = set() if stated is None else _layers(adapted) - stated
    if unstated:
        what = f"has updates of {_describe_layers(unstated)}, expected those of layers_to_transform only"
        yield Fault(where, what, _SAVE_AGAIN)


def _find_kind_fault(parts: Sequence[AdapterPart], settings: Mapping[str, Any], where: str) -> Fault | None:
    """Return why this kind of adapter is not supported; None if it is."""
    if settings["peft_type"] != "LORA":
        return Fault(
            where, f"unsupported peft_type (got {settings['peft_type']}, expected LORA)", "give a LoRA adapter"
        )
    unsupported = [key for key in _UNSUPPORTED if settings.get(key)]
    unsupported += ["bias"] if settings.get("bias", "none") != "none" else []
    if unsupported:
        what = f"unsupported kind of LoRA (got settings {', '.join(unsupported)}, expected a plain LoRA)"
        return Fault(where, what, "use the adapter with peft")
    if parts and not any(entry.numel for part in parts for entry in part.tensors.values()):
        what = "all tensors are empty: a run under DeepSpeed's ZeRO-3 saved placeholders instead of its shards"
        return Fault(where, what, "use the adapter of a checkpoint that was gathered (`zero_to_fp32.py` gathers one)")
    for part in parts:
        if any(role.startswith("lora_embedding_") for role in part.tensors):
            what = "a low-rank update of the embeddings, which is not supported"
            return Fault(f"{where}:{part.module}", what, "train the embeddings in full (modules_to_save)")
    return None


def _check_part(part: AdapterPart, settings: Mapping[str, Any], saved: Sequence[str]) -> str | None:
    """Return what is wrong with a part by itself; None if nothing is.

    Args:
        part: The part.
        settings: The adapter's ``adapter_config.json``.
        saved: Its ``modules_to_save``.
    """
    if not all("float" in entry.dtype for entry in part.tensors.values()):
        return "not floating-point numbers"
    if part.in_full:
        is_saved = bool(set(saved) & set(part.module.split(".")))
        return None if is_saved else "not a tensor of this kind of adapter"
    if "rows" in part.tensors:
        num_rows, shape = len(row_indices(part, settings)), part.tensors["rows"].shape
        fits = len(shape) == 2 and shape[0] == num_rows
        return None if fits else f"wrong shape (got {list(shape)}, expected {num_rows} rows)"
    roles = {"A", "B"} | {role for role, setting in _OPTIONAL.items() if settings.get(setting)}
    missing, unknown = sorted(roles - set(part.tensors)), sorted(set(part.tensors) - roles)
    if missing or unknown:
        faults = [f"{what} {', '.join(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
        return f"incomplete update ({'; '.join(faults)})"
    a_shape, b_shape, rank = part.tensors["A"].shape, part.tensors["B"].shape, scaling_of(part.module, settings)[0]
    if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[0] != rank or b_shape[1] != rank:
        return f"wrong shape (got A {list(a_shape)} and B {list(b_shape)}, expected rank {rank})"
    expected = (b_shape[0],)  # biases and magnitudes have a number for each output of the layer
    shapes = {role: tuple(part.tensors[role].shape) for role in _OPTIONAL if role in roles}
    wrong = [f"{role} {list(shape)}" for role, shape in shapes.items() if shape != expected]
    return f"wrong shape (got {', '.join(wrong)}, expected {list(expected)})" if wrong else None


def row_indices(part: AdapterPart, settings: Mapping[str, Any]) -> list[int]:
    """Return the numbers of the rows of an embedding that were trained."""
    indices = settings.get("trainable_token_indices") or []
    return list(indices.get(part.kind, []) if isinstance(indices, Mapping) else indices)


def find_base_faults(
    parts: Sequence[AdapterPart], settings: Mapping[str, Any], base: Mapping[str, Shape], where: str
) -> Iterator[Fault]:
    """Yield what prevents an adapter from being applied to a base.

    Args:
        parts: From ``split_adapter``.
        settings: The adapter's ``adapter_config.json``.
        base: Shapes of the base's tensors by our names.
        where: What to call the adapter in messages.

    Yields:
        A fault if the numbers of layers differ, and one for each kind of mismatch between modules.
    """
    expected = _expected_modules(settings, base, where)
    adapter_layers, base_layers = _layers(part.module for part in parts), _layers(expected)
    if adapter_layers and adapter_layers != base_layers:
        got = f"got {_describe_layers(adapter_layers)}, expected {_describe_layers(base_layers)}"
        yield Fault(where, f"the adapter and the base have different layers ({got})", _OTHER_BASE)
    unknown = [part.module for part in parts if not _changed_tensors(part) <= base.keys()]
    absent = set(unknown)
    misfits = [
        f"{part.module} (the base's is {list(base[part.module + '.weight'])})"
        for part in parts
        if part.module not in absent and not _fits(part, settings, base)
    ]
    adapted = {part.module for part in parts if "A" in part.tensors}
    missing = [module for module in expected if module not in adapted]
    for modules, what in (
        (unknown, "modules of the adapter are not in the base"),
        (misfits, "modules of the adapter have another shape in the base"),
        (missing, "modules of the base are missing from the adapter"),
    ):
        if modules:
            yield Fault(where, f"{len(modules)} {what}: {join_first(modules)}", _OTHER_BASE)


def _changed_tensors(part: AdapterPart) -> set[str]:
    """Return the tensors of the base that a part changes."""
    return {f"{part.module}.{role}" for role in part.tensors} if part.in_full else {f"{part.module}.weight"}


def _fits(part: AdapterPart, settings: Mapping[str, Any], base: Mapping[str, Shape]) -> bool:
    """Return whether a part's tensors have the shapes that the base's require."""
    if part.in_full:
        return all(base[f"{part.module}.{role}"] == entry.shape for role, entry in part.tensors.items())
    shape = base[f"{part.module}.weight"]
    if "rows" in part.tensors:
        rows = part.tensors["rows"].shape
        return rows[1:] == shape[1:] and max(row_indices(part, settings), default=0) < shape[0]
    if not {"A", "B"} <= set(part.tensors):
        return False
    return shape == (part.tensors["B"].shape[0], part.tensors["A"].shape[1])


def _expected_modules(settings: Mapping[str, Any], base: Mapping[str, Shape], where: str) -> list[str]:
    """Return the modules of a base that are to be adapted according to the settings."""
    modules = [name.removesuffix(".weight") for name in base if name.endswith(".weight")]
    targets = target_names(settings, modules, where)
    layers = _chosen_layers(settings)
    return targets if layers is None else [module for module in targets if _layers([module]) <= layers]


def _chosen_layers(settings: Mapping[str, Any]) -> set[int] | None:
    """Return the layers that the settings name; None for all."""
    chosen = settings.get("layers_to_transform")
    if chosen is None:
        return None
    return {chosen} if isinstance(chosen, int) else set(chosen)


def _layers(modules: Iterable[str]) -> set[int]:
    """Return the numbers of the layers that modules are in."""
    return {int(match[1]) for name in modules if (match := tensor_names.LAYER.search(name)) is not None}


def _describe_layers(layers: set[int]) -> str:
    if layers == set(range(len(layers))):
        return f"{len(layers)} layers"
    return f"layers {', '.join(map(str, sorted(layers)[:_SHOWN]))}"
