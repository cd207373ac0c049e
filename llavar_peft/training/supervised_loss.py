"""The loss of a batch: the cross entropy of the next token, at supervised positions alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.models.packed_attention import packed_arguments


def supervised_loss(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, int, Any]:
    """Run the model and sums the cross entropy of the next token over supervised positions.

    Args:
        model: A LLaVAR, wrapped as it may be.
        inputs: A batch of ``Collator``'s, without what is for the trainer.

    Returns:
        The sum in float32, the number of supervised positions, and the model's output. Without a supervised position
        the sum is 0 and still hangs on every trained parameter.
    """
    labels = inputs["labels"]
    targets = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:]
    forwarded = {name: value for name, value in inputs.items() if name not in ("labels", "lengths", "image_counts")}
    if "lengths" in inputs:
        forwarded.update(packed_arguments(inputs["lengths"], _unwrapped(model), labels.device))
    outputs = model(**forwarded, targets=targets, use_cache=False)
    return outputs.loss, int((targets != IGNORE_INDEX).sum()), outputs


def _unwrapped(model: Any) -> Any:
    """The model whose configuration says which attention it has: within the wrapper of DDP or DeepSpeed, if any."""
    while not hasattr(getattr(model, "config", None), "text_config"):
        model = model.module
    return model
