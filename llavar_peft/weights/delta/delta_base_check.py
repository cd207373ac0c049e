"""Whether a delta was taken from a base, told from the numbers alone.

A delta in fp16 is the rounded difference of two fp16 numbers, target - base. Both lie on grids: fp16 numbers near x are
multiples of ulp(x). Their exact difference is a multiple of the finer of the two steps, and rounding it to fp16, a
coarser or an equal grid, keeps it one. So with the right base every element of the delta is a multiple of
min(ulp(base), ulp(base + delta)), without exception. With another base of the same shape the steps are those of other
numbers, and wherever they come out coarser, elements of the delta fall between them: many with a model of another
training, and enough to tell with a finetune of the right one, such as Vicuna in the place of LLaMA.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llavar_peft.weights.io.tensor_blocks import read_elements
from llavar_peft.weights.io.tensor_table import TensorEntry
from llavar_peft.weights.weights_fingerprint import sampled_runs

if TYPE_CHECKING:
    from torch import Tensor

_PLACES, _RUN = 32, 4096
BOUND = 5e-5
"""Share of elements off the grid above which a base is refused."""
_TENSOR_BOUND, _TENSOR_FEWEST = 1e-3, 8
"""The same within one tensor, and how many must be off there: a base in which a few tensors differ."""
_MAGNITUDE = 0x7FFF


@dataclass(frozen=True, slots=True)
class DeltaBaseEvidence:
    """What the test found.

    Attributes:
        tested: Elements looked at.
        off: Elements that the base cannot have led to.
        tensors: Names of tensors that are off by themselves, the worst first.
    """

    tested: int
    off: int
    tensors: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the delta can have been taken from the base."""
        return not self.tensors and self.off <= BOUND * self.tested


def check_delta_base(base: Mapping[str, TensorEntry], delta: Mapping[str, TensorEntry]) -> DeltaBaseEvidence:
    """Tests a delta against a base, on up to 131,072 elements of each tensor spread over it.

    Args:
        base: Its tensors by released names.
        delta: Its tensors, fp16.

    Returns:
        The outcome. Tensors that only one side has are left out.

    Raises:
        WeightsError: A file ends early.
    """
    shared = [name for name in delta if name in base]
    with ThreadPoolExecutor(4) as pool:
        counts = dict(zip(shared, pool.map(lambda name: _count(base[name], delta[name]), shared), strict=True))
    bad = {name: off / tested for name, (tested, off) in counts.items() if _is_off(tested, off)}
    tested, off = (sum(count[side] for count in counts.values()) for side in (0, 1))
    return DeltaBaseEvidence(tested, off, tuple(sorted(bad, key=lambda name: -bad[name])))


def _is_off(tested: int, off: int) -> bool:
    return off >= _TENSOR_FEWEST and off > _TENSOR_BOUND * tested


def _count(base: TensorEntry, delta: TensorEntry) -> tuple[int, int]:
    # Rows that only the delta has come last and hold the target's own numbers.
    tested = off = 0
    for start, count in sampled_runs(min(base.numel, delta.numel), _PLACES, _RUN):
        old = read_elements(base, start, count).half()
        step = read_elements(delta, start, count).half()
        tested += count
        off += count_off_grid(old, step)
    return tested, off


def count_off_grid(base: Tensor, delta: Tensor) -> int:
    """How many elements of a delta are no multiple of the finer step of base and base + delta.

    Args:
        base: fp16, any shape.
        delta: fp16, the same shape.

    Returns:
        Their number; 0 for a delta that was taken from this base.
    """
    import torch

    target = (base + delta).view(torch.int16) & _MAGNITUDE
    # Rounding may have lifted the target onto a power of two, below which the step is half of that above.
    below = (target - 1).clamp(min=0)
    exponent = torch.minimum(_exponent(base.view(torch.int16)), _exponent(below))
    steps = torch.ldexp(delta.float(), 25 - exponent)
    return int((steps != steps.round()).sum())


def _exponent(bits: Tensor) -> Tensor:
    """The biased exponent; ulp is 2 to the power of it - 25. Numbers under the normal ones share the least."""
    return ((bits >> 10) & 31).clamp(min=1)
