"""What the tensors of an adapter are, told from their names and shapes: whether they make sense, and fit a base.

Nothing is read but headers, and no model is built.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llavar_peft.errors import Fault
from llavar_peft.weights.io.tensor_table import TensorEntry

PREFIX = "base_model.model."
"""What peft puts before our names."""
RETRAIN = "use it on the base it was trained on"
_SAVE_AGAIN = "save the adapter again with peft"
_ROLES = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.bias": "bias",
    ".lora_magnitude_vector": "magnitude",
    ".token_adapter.trainable_tokens_delta": "rows",
}
_OPTIONAL = {"bias": "lora_bias", "magnitude": "use_dora"}
"""Roles that an update has only under a setting."""
_LAYER = re.compile(r"\.language_model\.layers\.(\d+)\.")
_SHOWN = 6

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AdapterPart:
    """All that an adapter holds for one module of its base.

    Attributes:
        module: The module's name in our model, e.g. ``model.language_model.layers.0.mlp.up_proj``.
        tensors: By role: ``A``, ``B``, ``bias`` and ``magnitude`` of a low-rank update; ``rows`` of an embedding; or,
            of a module that was trained in full, its tensors by their own names (``weight``, ``bias``).
        whole: Whether it was trained in full.
    """

    module: str
    tensors: Mapping[str, TensorEntry]
    whole: bool

    @property
    def kind(self) -> str:
        """The last part of the module's name: what is alike in each layer."""
        return self.module.rsplit(".", 1)[-1]

    @property
    def parameters(self) -> int:
        """How many numbers."""
        return sum(entry.numel for entry in self.tensors.values())


def split_adapter(table: Mapping[str, TensorEntry]) -> tuple[AdapterPart, ...]:
    """Sorts an adapter's tensors by module.

    Args:
        table: By peft's names.

    Returns:
        One part for each module, in the order of the file.
    """
    found: dict[tuple[str, bool], dict[str, TensorEntry]] = {}
    for name, entry in table.items():
        plain = name.removeprefix(PREFIX)
        suffix = next((suffix for suffix in _ROLES if plain.endswith(suffix)), None)
        if suffix is not None:
            found.setdefault((plain.removesuffix(suffix), False), {})[_ROLES[suffix]] = entry
        else:
            module, _, own = plain.rpartition(".")
            found.setdefault((module, True), {})[own] = entry
    return tuple(AdapterPart(module, tensors, whole) for (module, whole), tensors in found.items())


def find_shape_faults(parts: Sequence[AdapterPart], settings: Mapping[str, Any], where: str) -> Iterator[Fault]:
    """Yield what of an adapter contradicts its own settings.

    Args:
        parts: Of ``split_adapter``.
        settings: Its ``adapter_config.json``.
        where: What to call it.

    Yields:
        A fault for each module.
    """
    if settings["peft_type"] != "LORA":
        yield Fault(where, f"not a LoRA adapter (got peft_type {settings['peft_type']})", "give a LoRA adapter")
        return
    if not any("A" in part.tensors for part in parts):
        yield Fault(where, "holds no low-rank update", _SAVE_AGAIN)
    saved = tuple(settings.get("modules_to_save") or ())
    for module in saved:
        if not any(part.whole and part.kind == module for part in parts):
            yield Fault(where, f"{module} was trained in full, and is not in it", _SAVE_AGAIN)
    if settings.get("trainable_token_indices") and not any("rows" in part.tensors for part in parts):
        yield Fault(where, "rows of the embeddings were trained, and are not in it", _SAVE_AGAIN)
    for part in parts:
        what = _odd(part, settings, saved)
        if what is not None:
            yield Fault(f"{where}:{part.module}", what, _SAVE_AGAIN)


def _odd(part: AdapterPart, settings: Mapping[str, Any], saved: Sequence[str]) -> str | None:
    if part.whole:
        return None if part.kind in saved else "not understood as part of this adapter"
    if "rows" in part.tensors:
        expected, got = len(row_indices(part, settings)), part.tensors["rows"].shape
        return (
            None if len(got) == 2 and got[0] == expected else f"rows misshapen (got {list(got)}, expected {expected})"
        )
    wanted_roles = {"A", "B"} | {role for role, setting in _OPTIONAL.items() if settings.get(setting)}
    absent, extra = sorted(wanted_roles - set(part.tensors)), sorted(set(part.tensors) - wanted_roles)
    if absent or extra:
        return f"its parts do not make an update (missing {absent}, unexpected {extra})"
    a, b, rank = part.tensors["A"].shape, part.tensors["B"].shape, scaling_of(part.module, settings)[0]
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        return f"misshapen (got A {list(a)} and B {list(b)}, expected rank {rank})"
    bad = [f"{role} {list(part.tensors[role].shape)}" for role in _OPTIONAL if role in wanted_roles]
    bad = [text for text in bad if not text.endswith(f" [{b[0]}]")]
    return f"misshapen (got {', '.join(bad)}, expected [{b[0]}])" if bad else None


def row_indices(part: AdapterPart, settings: Mapping[str, Any]) -> list[int]:
    """Which rows of an embedding were trained.

    Args:
        part: Of the embedding.
        settings: The adapter's.

    Returns:
        Their numbers.
    """
    indices = settings.get("trainable_token_indices") or []
    return list(indices.get(part.kind, []) if isinstance(indices, Mapping) else indices)


def scaling_of(module: str, settings: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and scale of a module's update.

    Args:
        module: Its name.
        settings: The adapter's.

    Returns:
        Both.

    Source: peft, tuners/lora/layer.py, ``update_layer``.
    """
    from peft.utils.other import get_pattern_key

    ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
    rank = int(ranks.get(get_pattern_key(ranks.keys(), module), settings["r"]))
    alpha = float(alphas.get(get_pattern_key(alphas.keys(), module), settings["lora_alpha"]))
    return rank, alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def find_base_faults(
    parts: Sequence[AdapterPart], settings: Mapping[str, Any], base: Mapping[str, Shape], where: str
) -> Iterator[Fault]:
    """Yield what keeps an adapter from being laid over a base of these shapes.

    Args:
        parts: Of ``split_adapter``.
        settings: The adapter's.
        base: Shapes of the base's tensors by our names.
        where: What to call the adapter.

    Yields:
        A fault if the numbers of layers differ, and one for each way in which modules do not meet.
    """
    expected = _expected(settings, base)
    theirs, ours = _layers(part.module for part in parts), _layers(expected)
    if theirs and theirs != ours:
        yield Fault(where, f"made for {_count(theirs)}, and the base has {_count(ours)}", RETRAIN)
    lost = [part.module for part in parts if not _targets(part) <= set(base)]
    bad = [
        f"{part.module} (the base's is {list(base[part.module + '.weight'])})"
        for part in parts
        if part.module not in lost and not _fits(part, settings, base)
    ]
    adapted = {part.module for part in parts if "A" in part.tensors}
    bare = [module for module in expected if module not in adapted]
    for modules, what in (
        (lost, "of its modules are not in the base"),
        (bad, "of its modules do not fit the base's"),
        (bare, "modules of the base have no part in it"),
    ):
        if modules:
            more = f", and {len(modules) - _SHOWN} more" if len(modules) > _SHOWN else ""
            yield Fault(where, f"{len(modules)} {what}: {', '.join(modules[:_SHOWN])}{more}", RETRAIN)


def _targets(part: AdapterPart) -> set[str]:
    return {f"{part.module}.{own}" for own in part.tensors} if part.whole else {f"{part.module}.weight"}


def _fits(part: AdapterPart, settings: Mapping[str, Any], base: Mapping[str, Shape]) -> bool:
    if part.whole:
        return all(base[f"{part.module}.{own}"] == entry.shape for own, entry in part.tensors.items())
    shape = base[f"{part.module}.weight"]
    if "rows" in part.tensors:
        rows = part.tensors["rows"].shape
        return rows[1:] == shape[1:] and max(row_indices(part, settings), default=0) < shape[0]
    if not {"A", "B"} <= set(part.tensors):
        return False
    return shape == (part.tensors["B"].shape[0], part.tensors["A"].shape[1])


def _expected(settings: Mapping[str, Any], base: Mapping[str, Shape]) -> list[str]:
    """The base's modules that an adapter's settings want adapted."""
    targets = settings.get("target_modules") or []
    modules = [name.removesuffix(".weight") for name, shape in base.items() if name.endswith(".weight")]
    if isinstance(targets, str):
        found = [module for module in modules if re.fullmatch(targets, module)]
    else:
        found = [module for module in modules if any(module == one or module.endswith(f".{one}") for one in targets)]
    chosen = settings.get("layers_to_transform")
    if chosen is None:
        return found
    layers = {chosen} if isinstance(chosen, int) else set(chosen)
    return [module for module in found if _layers([module]) <= layers]


def _layers(found: Iterable[str]) -> set[int]:
    return {int(match[1]) for name in found if (match := _LAYER.search(name)) is not None}


def _count(layers: set[int]) -> str:
    whole = layers == set(range(len(layers)))
    return f"{len(layers)} layers" if whole else f"layers {', '.join(map(str, sorted(layers)[:_SHOWN]))}"
