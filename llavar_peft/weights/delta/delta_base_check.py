"""Check that a delta was made from a base: by fingerprints, or by the values alone.

The test of values: an fp16 delta is the rounded difference of two fp16 numbers, target - base. fp16 numbers near x are
multiples of ulp(x). The exact difference is a multiple of the smaller of the two steps, and rounding it to fp16, whose
grid there is coarser or equal, keeps it one. So with the right base every element of the delta is a multiple of
min(ulp(base), ulp(base + delta)), without exception. With another base the steps are those of other numbers, and where
they are coarser, elements of the delta fall between them: many for a model of another training, and enough to detect a
finetuned version of the right base, such as Vicuna instead of LLaMA.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from llavar_peft.errors import Fault, WeightsError
from llavar_peft.weights.delta.released_layout import ReleasedView
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.tensor_blocks import join_first, read_runs
from llavar_peft.weights.io.tensor_table import TensorEntry
from llavar_peft.weights.io.weights_fingerprint import (
    FINGERPRINT_FILE,
    compare_fingerprints,
    read_fingerprint,
    sampled_runs,
    take_fingerprint,
)

if TYPE_CHECKING:
    from torch import Tensor

BaseCheckMethod = Literal["fingerprint", "statistics"]
_PLACES, _RUN = 32, 4096
MAX_OFF_GRID = 5e-5
"""Share of elements off the grid above which a base is rejected."""
_TENSOR_MAX_OFF_GRID, _TENSOR_MIN_COUNT = 1e-3, 8
"""The same share within one tensor, and the minimum count there: detects a base in which a few tensors differ."""
_MAGNITUDE = 0x7FFF
_GROWS = (tensor_names.RELEASED_EMBEDDINGS, tensor_names.HEAD)
_SHOWN = 6


def check_delta_base(base: ReleasedView, delta: ReleasedView) -> BaseCheckMethod:
    """Reject a base that a delta was not made from.

    Returns:
        How the base was recognized: ``"fingerprint"``, or ``"statistics"`` for a delta without one.

    Raises:
        WeightsError: It is another base; the message names the evidence.
    """
    fingerprints = read_fingerprint(delta.folder / FINGERPRINT_FILE)
    if fingerprints is not None and "base" in fingerprints:
        differences = compare_fingerprints(fingerprints["base"], take_fingerprint(base.table, base.config))
        if differences:
            raise _wrong_base(base, delta, f"its fingerprint differs in {join_first(differences)}")
        return "fingerprint"
    if any(entry.dtype == "bfloat16" for entry in delta.table.values()):
        raise WeightsError.at(
            str(delta.folder),
            f"no {FINGERPRINT_FILE} in it, without which the base of a delta in bfloat16 cannot be checked",
            "download the file too, or skip the check with --force",
        )
    evidence = sample_delta_values(base.table, delta.table)
    if not evidence.fits:
        share = evidence.off_grid / evidence.tested
        tensors = f"; worst tensors: {join_first(list(evidence.tensors))}" if evidence.tensors else ""
        what = f"{share:.2%} of {evidence.tested} sampled values of the delta cannot result from this base"
        raise _wrong_base(base, delta, f"{what} (expected at most {MAX_OFF_GRID:.3%}){tensors}")
    return "statistics"


def _wrong_base(base: ReleasedView, delta: ReleasedView, reason: str) -> WeightsError:
    fault = Fault(
        str(base.folder),
        f"not the base that {delta.folder} was made from: {reason}",
        "give the unchanged original base (for LLaVAR it is LLaMA-13B, not Vicuna), or use --force, which gives "
        "other weights",
    )
    return WeightsError(str(fault), (fault,))


def with_head_of(base: ReleasedView, other: ReleasedView) -> ReleasedView:
    """Return a base whose tied head, which is the embeddings, is stored as in a target or delta: once or twice."""
    table = dict(base.table)
    if base.config.get("tie_word_embeddings"):
        if tensor_names.HEAD not in other.table:
            table.pop(tensor_names.HEAD, None)
        elif tensor_names.HEAD not in table and tensor_names.RELEASED_EMBEDDINGS in table:
            table[tensor_names.HEAD] = table[tensor_names.RELEASED_EMBEDDINGS]
    return replace(base, table=table)


def check_matching_tensors(base: ReleasedView, other: ReleasedView) -> None:
    """Reject a base and a target (or delta) with different tensors, except for what LLaVA adds to it.

    Args:
        base: The base.
        other: The target or delta. It may have a projector, a cross-attention, and more rows of the embeddings and the
            head.

    Raises:
        WeightsError: Names what is missing, unexpected or misshapen, on either side.

    Source: the assertions of LLaVAR, llava/model/make_delta.py and apply_delta.py.
    """
    fix = "give a base and a target or delta of the same model"
    absent = [name for name in base.table if name not in other.table]
    unexpected = [name for name in other.table if name not in base.table and not _is_added(name)]
    if absent and unexpected:
        fix += "; publish a language model as a whole whose files have other names than its modules, as with experts"
    faults = [
        Fault(str(view.folder), f"{len(names)} tensors of {owner.folder} are missing: {join_first(names)}", fix)
        for view, owner, names in ((other, base, absent), (base, other, unexpected))
        if names
    ]
    for name, entry in other.table.items():
        if name in base.table and not _fits(name, base.table[name].shape, entry.shape):
            what = f"does not fit {other.folder} (got {list(base.table[name].shape)}, expected {list(entry.shape)})"
            faults.append(Fault(f"{base.folder}:{name}", what, fix))
    if faults:
        more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
        raise WeightsError("\n".join([*map(str, faults[:_SHOWN]), *more]), faults)


def _is_added(name: str) -> bool:
    parts = (tensor_names.RELEASED_PROJECTOR, tensor_names.CROSS_ATTENTION)
    return name == tensor_names.RELEASED_NEWLINE or name.startswith(parts)


def _fits(name: str, base: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return base == other or (name in _GROWS and base[1:] == other[1:] and base[0] <= other[0])


@dataclass(frozen=True, slots=True)
class DeltaBaseEvidence:
    """Result of the test of values.

    Attributes:
        tested: Number of elements tested.
        off_grid: Number of elements that are impossible with the base.
        tensors: Names of tensors that are conspicuous by themselves, the worst first.
    """

    tested: int
    off_grid: int
    tensors: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the delta can have been made from the base."""
        return not self.tensors and self.off_grid <= MAX_OFF_GRID * self.tested


def sample_delta_values(base: Mapping[str, TensorEntry], delta: Mapping[str, TensorEntry]) -> DeltaBaseEvidence:
    """Test a delta against a base, on up to 131,072 elements of each tensor, spread over it.

    Args:
        base: Its tensors by released names.
        delta: Its tensors, fp16. Tensors that only one side has are left out.

    Raises:
        WeightsError: A file ends early.
    """
    shared = [name for name in delta if name in base]
    with ThreadPoolExecutor(4) as pool:
        counts = dict(zip(shared, pool.map(lambda name: _count(base[name], delta[name]), shared), strict=True))
    bad = {
        name: off / tested
        for name, (tested, off) in counts.items()
        if off >= _TENSOR_MIN_COUNT and off > _TENSOR_MAX_OFF_GRID * tested
    }
    tested, off = (sum(count[side] for count in counts.values()) for side in (0, 1))
    return DeltaBaseEvidence(tested, off, tuple(sorted(bad, key=lambda name: -bad[name])))


def _count(base: TensorEntry, delta: TensorEntry) -> tuple[int, int]:
    # Rows that only the delta has are its last ones, and hold the target's own values.
    runs = sampled_runs(min(base.numel, delta.numel), _PLACES, _RUN)
    off = count_off_grid(read_runs(base, runs).half(), read_runs(delta, runs).half())
    return sum(count for _, count in runs), off


def count_off_grid(base: Tensor, delta: Tensor) -> int:
    """Count the elements of a delta that are no multiple of the smaller step of base and base + delta.

    Args:
        base: fp16, any shape.
        delta: fp16, the same shape.

    Returns:
        Their number; 0 for a delta that was made from this base.
    """
    import torch

    # Rounding may have raised the target to a power of two, below which the step is half of that above.
    target = ((base + delta).view(torch.int16) & _MAGNITUDE).sub_(1).clamp_(min=0)
    smaller = torch.minimum(base.view(torch.int16) & _MAGNITUDE, target)
    # The step is 2 ** (exponent - 25), with a biased exponent; subnormal numbers have the smallest one.
    exponent = (smaller >> 10).clamp_(min=1)
    # 2 ** (25 - exponent) in fp32, by its bits: the exponent is biased by 127.
    scale = ((127 + 25 - exponent.int()) << 23).view(torch.float32)
    steps = scale.mul_(delta)
    return int(torch.count_nonzero(steps != steps.trunc()))
