"""What an adapter does to each tensor of its base, read from its files as ``peft`` wrote them.

Source: peft, tuners/lora/layer.py (``get_delta_weight``), tuners/lora/variants.py (DoRA), tuners/trainable_tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.errors import ConfigError, Fault, WeightsError
from llavar_peft.weights.adapter.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    read_adapter_table,
    read_settings,
    read_tensor,
)
from llavar_peft.weights.adapter.adapter_parts import PREFIX, scaling_of
from llavar_peft.weights.io.tensor_blocks import first_not_finite

if TYPE_CHECKING:
    from torch import Tensor

_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_ROWS = ".token_adapter.trainable_tokens_delta"
# Settings under which the tensors mean something else than what is computed here.
_UNKNOWN = (
    "fan_in_fan_out", "layer_replication", "target_parameters", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "megatron_config", "arrow_config", "kasa_config", "velora_config", "monteclora_config",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LowRank:
    """W + scale B A; with a magnitude m (DoRA), each row of that brought to the length m."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    def applied(self, rows: Tensor, start: int) -> Tensor:
        """The update on some rows.

        Args:
            rows: fp32, shape (rows, in).
            start: Number of the first of them in the tensor.

        Returns:
            fp32, the same shape.
        """
        import torch

        stop = start + rows.shape[0]
        moved: Tensor = torch.addmm(rows, self.b[start:stop], self.a, alpha=self.scale)
        if self.magnitude is None:
            return moved
        length = torch.linalg.norm(moved, dim=1)
        scaled: Tensor = moved * (self.magnitude[start:stop] / length)[:, None]
        return scaled

    def output(self, x: Tensor, before: Tensor, rows: Tensor, start: int) -> Tensor:
        """What a linear layer gives with the update beside its weight, as ``peft`` computes it before a merge.

        Args:
            x: The layer's input, fp32, shape (tokens, in).
            before: Its output at some of its rows without the update, shape (tokens, rows).
            rows: Those rows of its weight without the update, fp32, shape (rows, in).
            start: Number of the first of them.

        Returns:
            Shape (tokens, rows).

        Source: peft, tuners/lora/layer.py (``Linear.forward``), tuners/lora/dora.py.
        """
        import torch

        stop = start + rows.shape[0]
        moved: Tensor = before + self.scale * ((x @ self.a.T) @ self.b[start:stop].T)
        if self.magnitude is None:
            return moved
        length = torch.linalg.norm(rows + self.scale * (self.b[start:stop] @ self.a), dim=1)
        scaled: Tensor = moved * (self.magnitude[start:stop] / length)
        return scaled

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can take the update."""
        return shape == (self.b.shape[0], self.a.shape[1])


@dataclass(frozen=True, slots=True)
class Replacement:
    """A tensor that was trained in full."""

    value: Tensor

    def applied(self, rows: Tensor, start: int) -> Tensor:
        """The update on some rows: they are not looked at."""
        return self.value[start : start + rows.shape[0]]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can take the update."""
        return shape == tuple(self.value.shape)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that were trained in full."""

    indices: Tensor
    value: Tensor

    def applied(self, rows: Tensor, start: int) -> Tensor:
        """The update on some rows."""
        inside = (self.indices >= start) & (self.indices < start + rows.shape[0])
        return rows.index_copy(0, self.indices[inside] - start, self.value[inside])

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can take the update."""
        return len(shape) == 2 and shape[1] == self.value.shape[1] and int(self.indices.max()) < shape[0]


Update = LowRank | Replacement | Rows


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        folder: Where it lies.
        settings: Its ``adapter_config.json``.
        updates: What it does, by our name of the base's tensor.
    """

    folder: Path
    settings: Mapping[str, Any]
    updates: Mapping[str, Update] = field(repr=False)


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter whole; it is small beside its base.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        Its updates in fp32.

    Raises:
        ConfigError: Not an adapter, or one of a kind that is not computed here.
        WeightsError: A tensor that is damaged, not understood, missing its partner, or not finite.
    """
    path = Path(folder)
    settings = _read_settings(path)
    tensors = {name: read_tensor(entry).float() for name, entry in read_adapter_table(path).items()}
    faults = [
        fault
        for name, tensor in tensors.items()
        if (fault := first_not_finite([tensor], f"{path / ADAPTER_WEIGHTS}:{name}")) is not None
    ]
    updates: dict[str, Update] = {}
    for name in tensors:
        target, update = _update_of(name, tensors, settings)
        if update is not None:
            updates[target] = update
        elif target == "":
            what = "not understood as part of an adapter"
            faults.append(Fault(f"{path / ADAPTER_WEIGHTS}:{name}", what, "save the adapter again with peft"))
    if faults:
        raise WeightsError("\n".join(map(str, faults)), faults)
    return Adapter(path, settings, updates)


def _update_of(name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[str, Update | None]:
    """Our name of the tensor that a stored one changes, and how; no update for the parts that come with another."""
    import torch

    if not name.startswith(PREFIX):
        return "", None
    plain = name.removeprefix(PREFIX)
    if name.endswith(_A):
        stem = name.removesuffix(_A)
        if stem + _B not in tensors:
            return "", None
        target = plain.removesuffix(_A)
        low = LowRank(
            tensors[name], tensors[stem + _B], scaling_of(target, settings)[1], tensors.get(stem + _MAGNITUDE)
        )
        return f"{target}.weight", low
    if name.endswith((_B, _MAGNITUDE)):
        partner = name.removesuffix(_B).removesuffix(_MAGNITUDE) + _A
        return (plain if partner in tensors else ""), None
    if name.endswith(_ROWS):
        target = plain.removesuffix(_ROWS)
        indices = settings["trainable_token_indices"]
        chosen = indices[target.rsplit(".", 1)[-1]] if isinstance(indices, Mapping) else indices
        return f"{target}.weight", Rows(torch.tensor(chosen), tensors[name])
    saved = settings.get("modules_to_save") or ()
    return (plain, Replacement(tensors[name])) if plain.rsplit(".", 2)[-2] in saved else ("", None)


def _read_settings(folder: Path) -> dict[str, Any]:
    settings = read_settings(folder)
    where, kind = str(folder / ADAPTER_CONFIG), settings["peft_type"]
    if settings.get("lora_bias"):
        raise ConfigError.at(
            where,
            "this adapter has biases, and LLaMA's layers have none to merge them into",
            "use it unmerged, or train one with bias: none",
        )
    unknown = [key for key in _UNKNOWN if settings.get(key)]
    if settings.get("bias", "none") != "none":
        unknown.append("bias")
    if kind != "LORA" or unknown:
        got = f"peft_type {kind}" if kind != "LORA" else f"with {', '.join(unknown)}"
        raise ConfigError.at(
            where, f"an adapter of a kind that is not merged here (got {got})", "merge it with peft itself"
        )
    return settings
