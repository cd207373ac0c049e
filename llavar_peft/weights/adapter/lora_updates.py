"""The updates of an adapter to the tensors of its base, read from the files that ``peft`` wrote.

Source: peft, tuners/lora/layer.py (``get_delta_weight``), tuners/lora/variants.py (DoRA), tuners/trainable_tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavar_peft.errors import ConfigError, Fault
from llavar_peft.weights.adapter.adapter_files import ADAPTER_CONFIG, PREFIX, scaling_of
from llavar_peft.weights.adapter.adapter_layouts import open_adapter
from llavar_peft.weights.adapter.adapter_parts import find_shape_faults, split_adapter
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.tensor_blocks import find_not_finite, raise_faults, read_tensor

if TYPE_CHECKING:
    from torch import Tensor

_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_ROWS = ".token_adapter.trainable_tokens_delta"


class LayerInput:
    """The input of a linear layer whose weight is read a block of rows at a time, and products that all blocks need.

    Args:
        x: fp32, shape (..., in).
    """

    def __init__(self, x: Tensor) -> None:
        self.shape = x.shape[:-1]
        self.rows = x.reshape(-1, x.shape[-1])
        """Shape (tokens, in)."""
        self._columns = self.rows.T.contiguous()
        self._inner: dict[int, Tensor] = {}

    def times(self, weight: Tensor) -> Tensor:
        """Return the product with rows of a weight, shape (tokens, rows)."""
        # With the small matrix on the right, BLAS takes half the time.
        return (weight @ self._columns).T

    def inner(self, a: Tensor) -> Tensor:
        """Return the product with a matrix A of an adapter, shape (tokens, rank); it is computed once."""
        if id(a) not in self._inner:
            self._inner[id(a)] = self.times(a)
        return self._inner[id(a)]


@dataclass(frozen=True, slots=True)
class LowRank:
    """W + scale B A; with a magnitude m (DoRA), each row of it scaled to the length m."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    def apply(self, rows: Tensor, start: int, *, overwrite: bool = False) -> Tensor:
        """Return rows of the weight after the update.

        Args:
            rows: fp32, shape (rows, in).
            start: Number of the first of them in the tensor.
            overwrite: Whether the result may be written into ``rows``, which saves a copy.

        Returns:
            fp32, the same shape.
        """
        import torch

        stop = start + rows.shape[0]
        moved: Tensor = torch.addmm(rows, self.b[start:stop], self.a, alpha=self.scale, out=rows if overwrite else None)
        if self.magnitude is None:
            return moved
        length = torch.linalg.norm(moved, dim=1)
        scale: Tensor = (self.magnitude[start:stop] / length)[:, None]
        moved *= scale
        return moved

    def output(self, x: LayerInput, before: Tensor, rows: Tensor, start: int) -> Tensor:
        """Return a linear layer's output with an unmerged update, computed as ``peft`` does.

        Args:
            x: The layer's input.
            before: Some columns of its output without the update, shape (tokens, rows).
            rows: The corresponding rows of its weight without the update, fp32, shape (rows, in).
            start: Number of the first of them.

        Returns:
            Shape (tokens, rows).

        Source: peft, tuners/lora/layer.py (``Linear.forward``), tuners/lora/dora.py.
        """
        import torch

        stop = start + rows.shape[0]
        moved: Tensor = before + self.scale * (x.inner(self.a) @ self.b[start:stop].T)
        if self.magnitude is None:
            return moved
        length = torch.linalg.norm(rows + self.scale * (self.b[start:stop] @ self.a), dim=1)
        scaled: Tensor = moved * (self.magnitude[start:stop] / length)
        return scaled

    def lookup(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """Return some rows of the weight with the unmerged update.

        Args:
            rows: fp32, shape (count, in), without the update.
            numbers: Of these rows in the tensor, shape (count,).
        """
        import torch

        moved = rows + self.scale * (self.b[numbers] @ self.a)
        if self.magnitude is None:
            return moved
        scaled: Tensor = moved * (self.magnitude[numbers] / torch.linalg.norm(moved, dim=1))[:, None]
        return scaled

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether the update can be applied to a tensor of this shape."""
        return shape == (self.b.shape[0], self.a.shape[1])


@dataclass(frozen=True, slots=True)
class Replacement:
    """A tensor that was trained in full."""

    value: Tensor

    def apply(self, rows: Tensor, start: int, *, overwrite: bool = False) -> Tensor:
        """Return rows of the tensor after the update; the values of the given rows are not used."""
        return self.value[start : start + rows.shape[0]]

    def output(self, x: LayerInput, before: Tensor, rows: Tensor, start: int) -> Tensor:
        """Return some columns of the output of the layer that replaces the base's, as for ``LowRank``."""
        return x.times(self.value[start : start + rows.shape[0]])

    def lookup(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """Return some rows of the tensor that replaces the base's."""
        return self.value[numbers]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether the update can be applied to a tensor of this shape."""
        return shape == tuple(self.value.shape)


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that were trained in full."""

    indices: Tensor
    value: Tensor

    def apply(self, rows: Tensor, start: int, *, overwrite: bool = False) -> Tensor:
        """Return rows of the tensor after the update."""
        inside = (self.indices >= start) & (self.indices < start + rows.shape[0])
        return rows.index_copy(0, self.indices[inside] - start, self.value[inside])

    def output(self, x: LayerInput, before: Tensor, rows: Tensor, start: int) -> Tensor:
        """Return some columns of a linear layer's output, those of the trained rows computed with their values."""
        moved = before.clone()
        for number, value in zip(self.indices.tolist(), self.value, strict=True):
            if start <= number < start + rows.shape[0]:
                moved[:, number - start] = x.rows @ value
        return moved

    def lookup(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """Return some rows of the tensor, those that were trained with their values."""
        found = rows.clone()
        for number, value in zip(self.indices.tolist(), self.value, strict=True):
            found[numbers == number] = value
        return found

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether the update can be applied to a tensor of this shape."""
        return len(shape) == 2 and shape[1] == self.value.shape[1] and int(self.indices.max()) < shape[0]


Update = LowRank | Replacement | Rows


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        folder: Its folder.
        settings: Its ``adapter_config.json``.
        updates: Its updates, by our name of the base's tensor.
    """

    folder: Path
    settings: Mapping[str, Any]
    updates: Mapping[str, Update] = field(repr=False)

    @property
    def tunes_tower(self) -> bool:
        """Whether it changes the vision tower."""
        return any(name.startswith(tensor_names.TOWER) for name in self.updates)


def read_adapter(folder: str | Path) -> Adapter:
    """Read a whole adapter, in fp32; it is small compared with its base.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        ConfigError: Not an adapter, or an unsupported kind of adapter.
        WeightsError: A tensor is damaged, unexpected, without its counterpart, or not finite.
    """
    stored = open_adapter(folder)
    path, settings = stored.folder, stored.settings
    if settings.get("lora_bias"):
        raise ConfigError.at(
            str(path / ADAPTER_CONFIG),
            "an adapter with biases cannot be merged, because LLaMA's layers have no biases",
            "use the adapter unmerged, or train one with bias: none",
        )
    raise_faults(list(find_shape_faults(split_adapter(stored.table), settings, str(path))))
    tensors = {name: read_tensor(entry).float() for name, entry in stored.table.items()}
    faults = [
        fault
        for name, tensor in tensors.items()
        if (fault := find_not_finite([tensor], stored.table[name].location)) is not None
    ]
    updates: dict[str, Update] = {}
    for name in tensors:
        target, update = _make_update(name, tensors, settings)
        if update is not None:
            updates[target] = update
        elif target == "":
            where = stored.table[name].location
            faults.append(Fault(where, "not a tensor of this kind of adapter", "save the adapter again with peft"))
    raise_faults(faults)
    return Adapter(path, settings, updates)


def _make_update(name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> tuple[str, Update | None]:
    """Return our name of the tensor that a stored one changes, and the update.

    The update is None for a tensor that belongs to another one's update; the name is empty for an unexpected tensor.
    """
    import torch

    if not name.startswith(PREFIX):
        return "", None
    plain = name.removeprefix(PREFIX)
    if name.endswith(_A):
        stem = name.removesuffix(_A)
        if stem + _B not in tensors:
            return "", None
        target = plain.removesuffix(_A)
        low_rank = LowRank(
            tensors[name], tensors[stem + _B], scaling_of(target, settings)[1], tensors.get(stem + _MAGNITUDE)
        )
        return f"{target}.weight", low_rank
    if name.endswith((_B, _MAGNITUDE)):
        counterpart = name.removesuffix(_B).removesuffix(_MAGNITUDE) + _A
        return (plain if counterpart in tensors else ""), None
    if name.endswith(_ROWS):
        target = plain.removesuffix(_ROWS)
        indices = settings["trainable_token_indices"]
        chosen = indices[target.rsplit(".", 1)[-1]] if isinstance(indices, Mapping) else indices
        return f"{target}.weight", Rows(torch.tensor(chosen), tensors[name])
    in_full = set(settings.get("modules_to_save") or ()) & set(plain.split("."))
    return (plain, Replacement(tensors[name])) if in_full else ("", None)
