"""The loss of a micro batch: cross entropy of the next token at supervised positions, in one or several passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.data.epoch_sampler import bins_under_limit
from llavar_peft.data.training_dataset import IMAGE_PLACES, IMAGE_STARTS, SUPERVISED_PLACES, split_batch
from llavar_peft.models.cross_attention import DetailSegment, detail_segments
from llavar_peft.models.detail_features import ImageDetails
from llavar_peft.models.packed_attention import packed_arguments, padded_arguments
from llavar_peft.models.rank_agreement import largest_of_ranks

SUPERVISED = "supervised"
"""Key of a batch under which the number of supervised positions of its whole micro batch is stored."""
_MODEL_INPUTS = (
    "input_ids", "attention_mask", "pixel_values", "image_layouts", "detail_values", SUPERVISED_PLACES, IMAGE_PLACES,
)  # fmt: skip


def supervised_loss(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, int, Any]:
    """Run the model and sum the cross entropy of the next token over supervised positions.

    Args:
        model: A LLaVAR, possibly wrapped by DDP or DeepSpeed.
        inputs: A batch from ``Collator``; only ``labels``, ``lengths`` and the model's inputs are read. Without the
            positions in ``PLACES``, the device is asked for them.

    Returns:
        The sum in float32, the number of supervised positions, and the model's output. Without a supervised position
        the sum is 0 and still depends on every trained parameter.
    """
    labels = inputs["labels"]
    targets = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    arguments = {name: inputs[name] for name in _MODEL_INPUTS if name in inputs}
    if "lengths" in inputs:
        arguments.update(packed_arguments(inputs["lengths"], _unwrap(model), labels.device))
    elif "attention_mask" in inputs:
        arguments.update(padded_arguments(inputs["attention_mask"], _unwrap(model)))
    if IMAGE_STARTS in inputs:
        arguments["details"] = ImageDetails(_detail_segments(inputs))
    outputs = model(**arguments, targets=targets, use_cache=False)
    if SUPERVISED_PLACES in inputs:
        return outputs.loss, len(inputs[SUPERVISED_PLACES]), outputs
    return outputs.loss, int((targets != IGNORE_INDEX).sum()), outputs


def _detail_segments(inputs: Mapping[str, Any]) -> tuple[DetailSegment, ...]:
    """Return which tokens of a batch attend to the features of which images."""
    rows, width = inputs["input_ids"].shape
    lengths = inputs.get("lengths", (width,) * rows)
    starts = accumulate(lengths[:-1], initial=0)
    return detail_segments(zip(starts, lengths, inputs[IMAGE_STARTS], strict=True))


def _unwrap(model: Any) -> Any:
    """Return the model whose configuration names its attention."""
    while not hasattr(getattr(model, "config", None), "text_config"):
        model = model.module
    return model


def split_micro_batch(
    accelerator: Accelerator, model: nn.Module, inputs: dict[str, Any], *, max_tokens: int | None
) -> Iterator[dict[str, Any]]:
    """Split a micro batch into passes, and exchange gradients between ranks in the last pass only, except with FSDP.

    Every rank makes as many passes as the rank that needs most, because with sharded weights all ranks communicate in
    each pass. The loss does not depend on the assignment of records to passes.

    Args:
        accelerator: The accelerator of the run.
        model: The wrapped model.
        inputs: A packed batch with the key ``SUPERVISED``; a padded batch is not split.
        max_tokens: Largest number of tokens of a pass; None means one pass.

    Yields:
        The batch of each pass. Run its backward pass before asking for the next one.
    """
    if max_tokens is None or "lengths" not in inputs:
        yield inputs
        return
    bins = bins_under_limit(inputs["lengths"], max_tokens)
    if accelerator.num_processes > 1:
        bins += [[]] * (largest_of_ranks(len(bins)) - len(bins))
    ends_step = accelerator.sync_gradients
    *earlier_passes, last_pass = split_batch(inputs, bins)
    # FSDP would hold the whole gradients of the model until they are exchanged; each pass leaves shards instead.
    exchanged_once = bool(earlier_passes) and ends_step and accelerator.distributed_type != DistributedType.FSDP
    # Before the last micro batch of a step nothing is exchanged anyway. DeepSpeed reads only ``sync_gradients``.
    with accelerator.no_sync(model) if exchanged_once else nullcontext():
        accelerator.sync_gradients = False
        for batch in earlier_passes:
            yield {**batch, SUPERVISED: inputs[SUPERVISED]}
    accelerator.sync_gradients = ends_step
    yield {**last_pass, SUPERVISED: inputs[SUPERVISED]}
