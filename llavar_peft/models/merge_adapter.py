"""``merge_adapter``: adapters merged into their base from disk to disk, and what that cost in logits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavar_peft.atomic_files import write_json
from llavar_peft.errors import WeightsError
from llavar_peft.models.merge_logits_gap import LogitsGap, measure_merge
from llavar_peft.weights.io.folder_writer import WeightsReport
from llavar_peft.weights.io.shard_layout import RELEASED_SHARD_SIZE, WeightsFormat
from llavar_peft.weights.io.write_weights import Progress
from llavar_peft.weights.merge.merge_plan import MergePlan, plan_merge, write_merged
from llavar_peft.weights.merge.merge_stream import Onto

logger = logging.getLogger(__name__)

MERGE_FILE = "merge.json"
"""Beside a merge's result: what it was made of, and how far its logits are from those before it."""
BOUND, BOUND_ORIGINAL = 0.05, 0.5
"""How far apart, relative to their spread, logits may be: where base and adapters are as they were in training, and
where adapters of a quantized base are merged onto the original."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What a merge wrote and what it cost.

    Attributes:
        out: The folder.
        tensors: How many.
        nbytes: Bytes of their numbers.
        seconds: How long the writing took.
        onto: What the adapters were added to.
        gaps: How far the logits of the ``result`` are from those of base and adapters as they were trained; and, where
            the result is on a dequantized base, how far they would be on the ``original``. Empty without a probe.
    """

    out: Path
    tensors: int
    nbytes: int
    seconds: float
    onto: Onto
    gaps: Mapping[str, LogitsGap]


def merge_adapter(  # noqa: PLR0913 - each is a choice of the caller's
    base: str | Path,
    adapter: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    onto: Onto | None = None,
    dtype: str | None = None,
    vision_tower: str | Path | None = None,
    projector: str | Path | None = None,
    form: WeightsFormat = "safetensors",
    shard_size: int = RELEASED_SHARD_SIZE,
    probe: bool = True,
    bound: float | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write a base with adapters merged into it, in the base's own layout.

    Computed in fp32 and rounded once; no more than a few blocks of a tensor are in memory. Killed or out of disk, the
    same call goes on where it was.

    Args:
        base: Folder of what the adapters were trained on: a checkpoint of ours; one in the released layout; or a plain
            LLaMA or Vicuna, which comes out as a whole LLaVAR in our layout, with tower, projector and new rows.
        adapter: One adapter's folder or several.
        out: Folder to make; must not exist.
        weights: None merges several one after another, each into the result of those before it (what was trained in
            full is then the last one's). Otherwise one factor for each: base + sum of factor * (merged alone - base).
        onto: For adapters of a base in 4 or 8 bits: ``"dequantized"`` adds them to the very numbers they were trained
            on, ``"original"`` to those on disk. None is the former, or the base as it is where it was not quantized.
        dtype: Of the result, by torch's name; None keeps each tensor's own.
        vision_tower: CLIP's folder, for a plain language model; None is where the adapter's run had it.
        projector: The stage-1 file that the adapter's run laid over the base; None is where the run had it.
        form: ``"safetensors"``, or ``"bin"`` as LLaVAR was released.
        shard_size: Bytes of a file at most.
        probe: Whether the logits before and after are compared. Reads base and result once more.
        bound: How far apart they may be, relative to their spread; None is 0.05, and 0.5 for ``"original"`` where the
            base was quantized.
        force: Go on with a base of the right shape that the adapters were not trained on.
        progress: Told after each tensor how many bytes are written, and of how many.

    Returns:
        What was written, and the gap.

    Raises:
        ConfigError: A folder that is not what it should be, or ``out`` exists.
        WeightsError: An adapter of another base; tensors that do not fit, damaged or not finite; a gap above the bound.
        InterruptedRunError: Ctrl-C.
        EnvironmentFaultError: The disk is full, or another process writes the same folder.
    """
    plan = plan_merge(
        base, adapter, weights=weights, onto=onto, vision_tower=vision_tower, projector=projector, force=force
    )
    gaps: dict[str, LogitsGap] = {}
    used: Onto = "dequantized" if plan.merged.rounding is not None else "original"

    def look(staged: Path) -> None:
        if probe:
            logger.info("comparing the logits before and after")
            folders = [one.folder for one in plan.merged.adapters]
            gaps.update(measure_merge(plan, staged, (*folders, Path(base), staged)))
            _check(plan, gaps["result"], bound, Path(out))
        write_json(staged / MERGE_FILE, _described(plan, Path(base), used, gaps))

    written = write_merged(
        plan, Path(out), dtype=dtype, form=form, shard_size=shard_size, progress=progress, check=look
    )
    return _report(written, used, gaps)


def _check(plan: MergePlan, gap: LogitsGap, bound: float | None, out: Path) -> None:
    as_trained = plan.trained == plan.merged.rounding
    allowed = bound if bound is not None else BOUND if as_trained else BOUND_ORIGINAL
    if not gap.relative <= allowed:  # NaN is above every bound
        fix = (
            "merge in a finer dtype, or give the base that the adapter was trained on"
            if as_trained
            else "merge onto the dequantized base (--onto dequantized)"
        )
        raise WeightsError.at(
            str(out),
            f"not written: the merged model's logits are too far from the adapter's (got {gap.relative:.2g} of their "
            f"spread, {gap.largest:.2g} at most; wanted {allowed:g} or less)",
            f"{fix}; or allow more (--bound)",
        )


def _described(plan: MergePlan, base: Path, onto: Onto, gaps: Mapping[str, LogitsGap]) -> dict[str, Any]:
    merged = plan.merged
    return {
        "base": str(base),
        "adapters": [str(one.folder) for one in merged.adapters],
        "weights": merged.weights,
        "trained_on": None if plan.trained is None else dataclasses.asdict(plan.trained),
        "onto": onto,
        "logits_gap": {name: dataclasses.asdict(one) for name, one in gaps.items()},
    }


def _report(written: WeightsReport, onto: Onto, gaps: Mapping[str, LogitsGap]) -> MergeReport:
    return MergeReport(written.out, written.tensors, written.nbytes, written.seconds, onto, dict(gaps))
