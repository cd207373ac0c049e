"""Compare two folders of weights written by contenders of ``weights.py``.

    python weights_check.py OURS PEER [BASE]

With a BASE, that of a merge, values may differ by one step of fp16: the rounding of a sum depends on the order of its
terms.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.tensor_blocks import open_weights


def compare(ours: Path, peer: Path, base: Path | None) -> dict[str, Any]:
    """Compare tensor by tensor.

    Returns:
        ``tensors``, ``elements``, ``differing`` elements and the ``largest`` difference; ``equal``, which is
        also False if one side has a tensor that the other has not.
    """
    new, old = open_weights(ours), open_weights(peer)
    before = open_weights(base) if base is not None else None
    # Buffers that the original copies are not part of the weights.
    needed = {name for name in old if base is not None or tensor_names.from_released(name) is not None}
    found = {"tensors": len(new), "elements": 0, "differing": 0, "largest": 0.0}
    equal = set(new) == needed
    for name in needed & set(new):
        one, other = new[name].float(), old[name].float()
        apart = (one - other).abs()
        found["elements"] += one.numel()
        found["differing"] += int(torch.count_nonzero(apart))
        found["largest"] = max(found["largest"], float(apart.max()))
        allowed = torch.zeros(()) if before is None else _step(torch.maximum(one.abs(), before[name].float().abs()))
        equal &= bool((apart <= allowed).all())
    return {**found, "equal": equal}


def _step(numbers: Tensor) -> Tensor:
    """Return the distance between neighbouring fp16 numbers."""
    _, exponent = torch.frexp(numbers)
    return torch.ldexp(torch.ones_like(numbers), (exponent - 11).clamp(min=-24))


if __name__ == "__main__":
    folders = [Path(argument) for argument in sys.argv[1:]]
    result = compare(folders[0], folders[1], folders[2] if len(folders) > 2 else None)
    sys.stdout.write(json.dumps(result) + "\n")
