"""``merge_adapter``: merge adapters into their base, from disk to disk, and check how the logits change."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavar_peft.atomic_files import write_json, write_text
from llavar_peft.constants import MODEL_TYPE
from llavar_peft.data.conversation_template import CHAT_TEMPLATE, VICUNA_CHAT_TEMPLATE
from llavar_peft.errors import WeightsError
from llavar_peft.models.hf_llava import read_stock, stock_chat_template
from llavar_peft.models.language_model_loading import read_converted
from llavar_peft.models.merge_lockstep import measure_merge, probed_names
from llavar_peft.models.merge_logits_gap import LogitsGap
from llavar_peft.models.tower_loading import read_tower_tensors
from llavar_peft.types import ReadableRepr, expand_home
from llavar_peft.weights.io.companion_files import CHAT_TEMPLATE_FILE, PROCESSOR_FILE
from llavar_peft.weights.io.shard_layout import RELEASED_SHARD_SIZE, WeightsFormat
from llavar_peft.weights.io.tensor_stream import TensorStream
from llavar_peft.weights.io.weights_card import adapter_name, portable_name, write_weights_card
from llavar_peft.weights.io.write_weights import Along, Progress
from llavar_peft.weights.merge.merge_plan import MergePlan, plan_merge, write_merged
from llavar_peft.weights.merge.merge_stream import Onto

MERGE_FILE = "merge.json"
"""File in the result's folder: what was merged, and how far its logits are from those before the merge."""
BOUND, BOUND_ORIGINAL = 0.05, 0.5
"""The largest accepted difference of the logits, relative to their standard deviation: if the base is stored as it was
in training, and if adapters of a quantized base are merged onto the original one."""


@dataclass(frozen=True, slots=True, repr=False)
class MergeReport(ReadableRepr):
    """What a merge wrote, and how far its logits are from those before it.

    Attributes:
        out: The folder.
        tensors: Number of tensors.
        nbytes: Size of the tensors in bytes.
        seconds: Time to write them.
        onto: The base that the adapters were added to.
        gaps: The difference of the ``result``'s logits from those of base and adapters as they were trained; for a
            dequantized base also the difference that the ``original`` base would have. Empty without a probe.
    """

    out: Path
    tensors: int
    nbytes: int
    seconds: float
    onto: Onto
    gaps: Mapping[str, LogitsGap]


def merge_adapter(  # noqa: PLR0913 - the options of the merge
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

    The merge is computed in float32 and rounded once, with a few blocks of one tensor in memory. After an interruption
    or a full disk, the same call resumes.

    Args:
        base: Folder of the base that the adapters were trained on: a checkpoint in this package's layout, in that of
            stock transformers, or in the released one; or a plain LLaMA or Vicuna, from which a complete LLaVAR in this
            package's layout is written, with tower, projector and new rows.
        adapter: One adapter's folder or several.
        out: Folder to create; must not exist.
        weights: None merges several adapters one after another, each into the result of those before it (tensors that
            were trained in full are then the last adapter's). Otherwise one factor per adapter:
            base + sum of factor * (merged alone - base).
        onto: For adapters of a base in 4 or 8 bits: ``"dequantized"`` adds them to the numbers that they were trained
            on, ``"original"`` to those on disk. None is ``"dequantized"``, or the unchanged base if it was not
            quantized.
        dtype: Of the result, by torch's name; None keeps each tensor's own.
        vision_tower: CLIP's folder, for a plain language model; None is the folder that the adapter's run used.
        projector: The stage-1 file that the adapter's run loaded; None is the file that the run used.
        form: ``"safetensors"``, or ``"bin"`` as LLaVAR was released.
        shard_size: Maximum number of bytes per file.
        probe: Whether to compare the logits before and after, while the weights are written.
        bound: The largest accepted difference of the logits, relative to their standard deviation; None is 0.05, and
            0.5 for ``"original"`` if the base was quantized.
        force: Accept a base of the right shape that the adapters were not trained on.
        progress: Called after each tensor with the number of bytes written and in total.

    Returns:
        What was written, and the difference of the logits.

    Raises:
        ConfigError: A folder does not hold what its argument requires, or ``out`` exists.
        WeightsError: An adapter was trained on another base; a tensor has the wrong shape, is damaged or not finite; or
            the logits differ by more than the bound.
        InterruptedRunError: Ctrl-C.
        EnvironmentFaultError: The disk is full, or another process writes the same folder.
    """
    plan = plan_merge(
        base,
        adapter,
        weights=weights,
        onto=onto,
        vision_tower=vision_tower,
        projector=projector,
        force=force,
        read_tower=read_tower_tensors,
        read_language=read_converted,
    )
    gaps: dict[str, LogitsGap] = {}
    used: Onto = "dequantized" if plan.merged.rounding is not None else "original"

    def check_and_describe(staged: Path) -> None:
        if probe:
            _check_gap(plan, gaps["result"], bound, expand_home(out))
        write_chat_template(plan, staged)
        write_json(staged / MERGE_FILE, _describe(plan, Path(base), used, gaps))
        _write_card(plan, staged, {"base": base, "vision tower": vision_tower, "projector": projector}, gaps)

    def measure(stream: TensorStream) -> None:
        folders = [adapter.folder for adapter in plan.merged.adapters]
        tokenizers = (*folders, plan.folder, *plan.merged.base.companions)
        gaps.update(measure_merge(plan, stream, dtype, tokenizers))

    written = write_merged(
        plan,
        expand_home(out),
        dtype=dtype,
        form=form,
        shard_size=shard_size,
        progress=progress,
        check=check_and_describe,
        along=Along(probed_names(plan), measure) if probe else None,
    )
    return MergeReport(written.out, written.tensors, written.nbytes, written.seconds, used, dict(gaps))


def _write_card(
    plan: MergePlan, staged: Path, sources: Mapping[str, str | Path | None], gaps: Mapping[str, LogitsGap]
) -> None:
    """Write the model card of a merge's result."""
    gap = gaps.get("result")
    figures = {} if gap is None else {
        "difference of the logits from those before the merge, in standard deviations": f"{gap.relative:.1e}",
        "same top token as before the merge": f"{gap.same_top:.0%} of {gap.tokens} positions",
    }  # fmt: skip
    adapters = [adapter.folder for adapter in plan.merged.adapters]
    title = f"{portable_name(sources['base'] or '')} with {', '.join(map(adapter_name, adapters))} merged into it"
    given_sources = {what: source for what, source in sources.items() if source is not None}
    write_weights_card(staged, title, given_sources, adapters=adapters, figures=figures)


def write_chat_template(plan: MergePlan, staged: Path) -> None:
    """Write the Jinja template of a merge's result into its folder, which has the other files of the processor.

    Args:
        plan: The merge.
        staged: The result's folder.
    """
    config = plan.merged.base.config
    if config.get("model_type") == MODEL_TYPE:
        write_text(staged / CHAT_TEMPLATE_FILE, _chat_template(plan, staged))
    elif "text_config" in config:
        write_text(staged / CHAT_TEMPLATE_FILE, stock_chat_template(read_stock(plan.folder)))


def _chat_template(plan: MergePlan, staged: Path) -> str:
    """Return the Jinja template of the merged model's conversations.

    It is ours rather than that of the base, because anyone who opens the result runs it; only a model that uses the
    template of its tokenizer keeps that.
    """
    path = staged / PROCESSOR_FILE
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    template = settings.get("template", "llava_v1")
    if template == "chat":
        for folder in reversed(plan.merged.base.companions):
            if (folder / CHAT_TEMPLATE_FILE).is_file():
                return (folder / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
    return VICUNA_CHAT_TEMPLATE if template == "vicuna_v1" else CHAT_TEMPLATE


def _check_gap(plan: MergePlan, gap: LogitsGap, bound: float | None, out: Path) -> None:
    """Reject a result whose logits differ from those before the merge by more than a bound."""
    as_trained = plan.trained == plan.merged.rounding
    default_bound = BOUND if as_trained else BOUND_ORIGINAL
    allowed = default_bound if bound is None else bound
    if not gap.relative <= allowed:  # also true for NaN
        fix = (
            "merge in a more precise dtype, or give the base that the adapter was trained on"
            if as_trained
            else "merge onto the dequantized base (--onto dequantized)"
        )
        raise WeightsError.at(
            str(out),
            f"not written: the merge changes the logits too much (got {gap.relative:.2g} of their standard deviation, "
            f"largest difference {gap.largest:.2g}; expected at most {allowed:g})",
            f"{fix}; or accept a larger difference with --bound",
        )


def _describe(plan: MergePlan, base: Path, onto: Onto, gaps: Mapping[str, LogitsGap]) -> dict[str, Any]:
    """Return the content of ``MERGE_FILE``."""
    merged = plan.merged
    return {
        "base": str(base),
        "adapters": [str(adapter.folder) for adapter in merged.adapters],
        "weights": merged.weights,
        "trained_on": None if plan.trained is None else dataclasses.asdict(plan.trained),
        "onto": onto,
        "logits_gap": {name: dataclasses.asdict(gap) for name, gap in gaps.items()},
    }
