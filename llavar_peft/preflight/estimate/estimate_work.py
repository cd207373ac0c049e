"""How long the records are, and what computing on them comes to."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llavar_peft.data.record_store import open_records
from llavar_peft.data.training_dataset import image_count, text_tokens
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.preflight.estimate.estimate_memory import Counts
from llavar_peft.recipe.schema import Full, Stage

_SAMPLE = 2000


@dataclass(frozen=True, slots=True)
class RecordLengths:
    """Of a stage's records.

    Attributes:
        records: Their number; None where they are not here, and each is taken to be as long as the stage allows.
        mean: Tokens of one, on average.
        longest: Tokens of the longest looked at.
        squares: Mean square of the tokens.
        images: Images of one, on average.
    """

    records: int | None
    mean: float
    longest: int
    squares: float
    images: float


def measure_records(stage: Stage, config: LlavarConfig) -> RecordLengths:
    """Look at a stage's records, or at some of them.

    Args:
        stage: The stage.
        config: The model's.

    Returns:
        Their lengths, text taken at four bytes a token.

    Raises:
        DataError: The files are there and are not records.
    """
    given = stage.data.records
    paths = (given,) if isinstance(given, str) else given
    if not all(Path(path).expanduser().exists() for path in paths):
        most = stage.max_length
        return RecordLengths(None, most, most, most**2, 1.0)
    records = open_records(paths)
    places = range(0, len(records), max(1, len(records) // _SAMPLE))
    image = config.image_seq_length + 2 * bool(config.use_im_start_end)
    images = [image_count(records[place]) for place in places]
    lengths = [
        min(text_tokens(records[place]) + image * count, stage.max_length)
        for place, count in zip(places, images, strict=True)
    ]
    return RecordLengths(
        len(records), _mean(lengths), max(lengths), _mean(one**2 for one in lengths), _mean(images)
    )  # fmt: skip


def largest_pass(stage: Stage, lengths: RecordLengths) -> int:
    """Tokens of the largest forward pass on a GPU: the longest records together."""
    most = stage.micro_batch_size * lengths.longest
    return most if stage.max_tokens is None or not stage.packing else min(most, max(stage.max_tokens, lengths.longest))


def steps(stage: Stage, lengths: RecordLengths) -> int | None:
    """Optimizer steps of a stage; None where the records are not here to be counted."""
    if stage.max_steps is not None:
        return stage.max_steps
    if lengths.records is None:
        return None
    held = stage.data.holdout if stage.data.holdout >= 1 else stage.data.holdout * lengths.records
    return math.ceil(math.ceil((lengths.records - int(held)) / stage.global_batch_size) * stage.epochs)


def flops_per_step(config: LlavarConfig, stage: Stage, counts: Counts, lengths: RecordLengths) -> float:
    """Floating point operations of an optimizer step, over all GPUs; a multiplication with its addition is two.

    Args:
        config: The model's.
        stage: The stage.
        counts: The model's.
        lengths: Of its records.

    Returns:
        What the model takes, with what is computed twice where activations are not kept.
    """
    text, vision = config.text_config, config.vision_config
    linear = 2.0 * counts.linear * lengths.mean
    # Queries by keys and probabilities by values, of which a causal mask leaves half.
    attention = 2.0 * text.num_hidden_layers * text.hidden_size * lengths.squares
    forward = linear + attention
    weights = linear if isinstance(stage.tune, Full) else 0.0
    again = forward if stage.gradient_checkpointing is True else 0.0
    adapters = 6.0 * counts.adapters * lengths.mean
    patches = config.image_seq_length + 1
    used = (vision.num_hidden_layers + 1 + config.vision_feature_layer) / vision.num_hidden_layers
    tower = lengths.images * used * (
        2.0 * counts.tower * patches + 4.0 * vision.num_hidden_layers * vision.hidden_size * patches**2
    )  # fmt: skip
    spoken = max(0.0, lengths.mean - lengths.images * config.image_seq_length)
    head = (6.0 if isinstance(stage.tune, Full) else 4.0) * text.vocab_size * text.hidden_size * spoken
    backward = linear + 2.5 * attention
    each: float = forward + backward + weights + again + adapters + tower + head
    return stage.global_batch_size * each


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)
