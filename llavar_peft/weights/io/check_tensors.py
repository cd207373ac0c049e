"""A table of tensors held against the table a model wants: every difference is named."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llavar_peft.errors import Fault, WeightsError

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 8


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], *, where: str, subset: bool = False
) -> None:
    """Reject tensors that do not fit.

    Args:
        tensors: What there is, by our names.
        expected: Shapes wanted, by our names.
        where: File or folder, for the message.
        subset: Whether tensors may be missing (a projector file laid over a model).

    Raises:
        WeightsError: Names every tensor that is missing, extra or misshapen (the first eight of each).
    """
    missing = [] if subset else [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    misshapen = [
        f"{name} (got {list(tensor.shape)}, expected {list(expected[name])})"
        for name, tensor in tensors.items()
        if name in expected and tuple(tensor.shape) != tuple(expected[name])
    ]
    fix = "use weights that were saved whole from this model, with their own configuration"
    faults = [
        Fault(where, f"{len(found)} {kind}: {_some(found)}", fix)
        for kind, found in (("tensors missing", missing), ("tensors extra", extra), ("tensors misshapen", misshapen))
        if found
    ]
    if faults:
        raise WeightsError("\n".join(str(fault) for fault in faults), faults)


def _some(found: list[str]) -> str:
    return ", ".join(found[:_SHOWN]) + (f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
