"""The lengths of a stage's records, and the number of steps and operations that follow from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llavar_peft.data.hub_sources import TableSelection, is_hub_source
from llavar_peft.data.record_store import open_records
from llavar_peft.data.training_dataset import count_held_out, image_count, text_tokens
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.tower_loading import count_extra_positions
from llavar_peft.preflight.estimate_counts import Counts, tower_depth
from llavar_peft.preflight.estimate_views import detail_shape, image_cost
from llavar_peft.recipe.data_sources import columns_of, paths_of, size_of_epoch, sources_of
from llavar_peft.recipe.schema import Full, Lora, Stage, Tune
from llavar_peft.recipe.schema_rules import tunes_tower
from llavar_peft.types import expand_home

_SAMPLE = 2000


@dataclass(frozen=True, slots=True)
class RecordLengths:
    """Lengths of a stage's records, estimated from a sample.

    Attributes:
        records: Number of records; None if the files are missing, and then every record has the maximum length.
        mean: Mean number of tokens per record.
        longest: Number of tokens of the longest record.
        squares: Mean of the squared number of tokens.
        images: Mean number of images per record.
        image_tokens: Mean number of their tokens per record.
        views: Mean number of views of them per record, which the vision tower gets.
        counts: Number of records of each source.
    """

    records: int | None
    mean: float
    longest: int
    squares: float
    images: float
    image_tokens: float
    views: float
    counts: tuple[int, ...] = ()


def measure_records(stage: Stage, config: LlavarConfig) -> RecordLengths:
    """Return the lengths of a stage's records, with four bytes of text counted as one token.

    Raises:
        DataError: The files exist and are not records.
    """
    sources = sources_of(stage.data)
    paths = [path for source in sources for path in paths_of(source.records)]
    if not all(not is_hub_source(path) and expand_home(path).exists() for path in paths):
        most = stage.max_length
        cost = image_cost(config, most)
        return RecordLengths(None, most, most, most**2, 1.0, cost.tokens, cost.views)
    opened = [
        open_records(
            paths_of(source.records),
            selection=TableSelection(source.split, source.config, source.streaming, columns_of(source)),
        )
        for source in sources
    ]
    counts = tuple(map(len, opened))
    every = max(1, sum(counts) // _SAMPLE)
    sample, shares = [], []
    for source, records in zip(sources, opened, strict=True):
        places = range(0, len(records), every)
        sample += [records[place] for place in places]
        shares += [source.weight] * len(places)
    images = [image_count(record) for record in sample]
    measured = [
        _measure_record(config, stage.max_length, text_tokens(record), count)
        for record, count in zip(sample, images, strict=True)
    ]
    lengths, image_tokens, views = ([one[place] for one in measured] for place in range(3))
    means = (_mean(values, shares) for values in (lengths, [one**2 for one in lengths], images, image_tokens, views))
    mean, squares, each, tokens_each, views_each = means
    return RecordLengths(sum(counts), mean, max(lengths), squares, each, tokens_each, views_each, counts)


def _measure_record(config: LlavarConfig, most: int, text: int, images: int) -> tuple[int, int, int]:
    """Return the numbers of tokens, of image tokens, and of views of a record.

    Args:
        config: The model's configuration.
        most: Maximum number of tokens.
        text: Number of tokens of the text.
        images: Number of images.
    """
    if not images:
        return min(text, most), 0, 0
    ends = 2 * bool(config.use_im_start_end)
    cost = image_cost(config, (most - text) // images - ends, images=images)
    return min(text + images * (cost.tokens + ends), most), images * cost.tokens, images * cost.views


def largest_pass(stage: Stage, lengths: RecordLengths, *, packs: bool) -> int:
    """Return the number of tokens of the largest forward pass on a GPU, which has the longest records.

    Args:
        stage: The stage.
        lengths: Lengths of its records.
        packs: Whether the language model's attention supports packed rows, which ``max_tokens`` needs.
    """
    most = stage.micro_batch_size * lengths.longest
    limited = packs and stage.packing and stage.max_tokens is not None
    return min(most, max(stage.max_tokens or 0, lengths.longest)) if limited else most


def count_steps(stage: Stage, lengths: RecordLengths) -> int | None:
    """Return the number of optimizer steps of a stage, or None if its records are missing."""
    if stage.max_steps is not None:
        return stage.max_steps
    if lengths.records is None:
        return None
    held = count_held_out(lengths.records, stage.data.holdout)
    size = size_of_epoch(lengths.counts or (lengths.records,), held, stage.data)
    return math.ceil(math.ceil(size / stage.global_batch_size) * stage.epochs)


def flops_per_step(config: LlavarConfig, stage: Stage, counts: Counts, lengths: RecordLengths) -> float:
    """Return the floating point operations of an optimizer step, over all GPUs.

    A multiplication with its addition counts as two. Operations that are repeated because activations are recomputed
    are included.
    """
    text = config.text_config
    # Queries by keys and probabilities by values; a causal mask halves both. Their gradients need five products.
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = 2.0 * text.num_hidden_layers * head_width * text.num_attention_heads * lengths.squares
    linear = 2.0 * counts.linear * lengths.mean
    layers = attention + linear + 2.5 * attention + linear * (2.0 if isinstance(stage.tune, Full) else 1.0)
    if isinstance(stage.tune, Lora):
        layers += _adapter_flops(config, stage, stage.tune, counts, lengths)
        layers -= _without_input_gradients(stage, stage.tune, counts, lengths)
    if stage.gradient_checkpointing is True:
        layers += attention + linear - _not_recomputed(config, stage.tune, counts, lengths)
    text_length = max(0.0, lengths.mean - lengths.image_tokens)
    head = (6.0 if isinstance(stage.tune, Full) else 4.0) * text.vocab_size * text.hidden_size * text_length
    images = _image_flops(config, stage, counts, lengths) + _cross_attention_flops(config, stage, counts, lengths)
    total: float = layers + head + images
    return stage.global_batch_size * total


def _adapter_flops(config: LlavarConfig, stage: Stage, tune: Lora, counts: Counts, lengths: RecordLengths) -> float:
    """Return the operations that adapters add to a record, including their recomputation."""
    shapes = [shape for name, shape in counts.matrices.items() if name in counts.adapted]
    layers: int = config.text_config.num_hidden_layers
    recomputes = stage.gradient_checkpointing is True
    added = (8.0 if recomputes else 6.0) * tune.rank * layers * sum(map(sum, shapes)) * lengths.mean
    if tune.variant != "dora":
        return added
    # peft multiplies the adapter's factors in each pass, by way of a unit matrix, for the norms of the changed weights.
    norms = 2.0 * tune.rank * layers * sum(width * (width + height) for height, width in shapes)
    added += (2 if recomputes else 1) * norms / stage.micro_batch_size
    # With dropout, it computes the layers on the dropped inputs once more.
    share = layers * sum(height * width for height, width in shapes) / counts.linear
    again = (6.0 if recomputes else 4.0) * counts.linear * share * lengths.mean
    return added + (again if tune.dropout > 0 else 0.0)


def _without_input_gradients(stage: Stage, tune: Lora, counts: Counts, lengths: RecordLengths) -> float:
    """Return the operations for gradients of the first layer's inputs, where nothing before that layer is trained.

    Gradient checkpointing computes them nevertheless.
    """
    if tune.train_projector or tune.train_image_rows or stage.gradient_checkpointing is not False:
        return 0.0
    widths = sum(
        height * width + (tune.rank * width if name in counts.adapted else 0)
        for name, (height, width) in counts.matrices.items()
        if name.startswith("self_attn.") and not name.startswith("self_attn.o_proj.")
    )
    return 2.0 * widths * lengths.mean


def _not_recomputed(config: LlavarConfig, tune: Tune, counts: Counts, lengths: RecordLengths) -> float:
    """Return the operations of a record at the end of its layers, which need not be repeated for a gradient."""
    if counts.has_final_norm:
        return 0.0
    text = config.text_config
    adapted = "mlp.down_proj.weight" in counts.adapted
    inputs = tune.rank if isinstance(tune, Lora) and adapted else text.intermediate_size
    skipped: float = 2.0 * text.num_hidden_layers * inputs * text.hidden_size * lengths.mean
    return skipped


def _image_flops(config: LlavarConfig, stage: Stage, counts: Counts, lengths: RecordLengths) -> float:
    """Return the operations of a record's images in tower and projector."""
    vision, tune, patches = config.vision_config, stage.tune, config.image_seq_length
    side = math.isqrt(patches) * vision.patch_size
    positions = patches + count_extra_positions(vision, side, Path("config.json"))
    attention = 4.0 * tower_depth(config) * vision.hidden_size * positions**2
    linear, patch = 2.0 * counts.tower_linear * positions, 2.0 * counts.tower_patch * patches
    tower = linear + patch + attention
    if tunes_tower(tune):
        # Gradients of inputs, and of the tower's own weights or of its adapters.
        full = isinstance(tune, Full)
        tower += 2.5 * attention + linear * (1.0 + full) + patch * full
        added = 2.0 * counts.tower_trained * positions * (not full)
        tower += 3.0 * added + (linear + attention + added) * (stage.gradient_checkpointing is True)
    trained = not isinstance(tune, Lora) or tune.train_projector
    projected = image_cost(config, stage.max_length).projected
    projector = (4.0 if trained else 2.0) * counts.projector * projected
    if trained and config.projector_hidden_act != "linear":  # the gradient of the second layer's input
        projector += 2.0 * config.text_config.hidden_size**2 * projected
    # The features of the crops reach the language model by the cross-attention.
    projections = lengths.views if config.cross_attention is None else lengths.images
    return float(lengths.views * tower + projections * projector)


def _cross_attention_flops(config: LlavarConfig, stage: Stage, counts: Counts, lengths: RecordLengths) -> float:
    """Return the operations of a record in the cross-attention of all layers.

    Every token is taken to follow the record's images; those before them are few.
    """
    details = detail_shape(config)
    if details is None:
        return 0.0
    text, wide = config.text_config, config.text_config.hidden_size
    features = details.features * lengths.images
    # Q and O of the tokens, K and V of the features; the gradients of inputs and of weights take as much again, each.
    linear = 4.0 * wide * (wide * lengths.mean * min(1.0, lengths.images) + details.width * features)
    scores = 4.0 * lengths.mean * features * wide
    recomputed = linear + scores if stage.gradient_checkpointing is True else 0.0
    encoder = 2.0 * counts.encoder * features  # without its attention
    total: float = text.num_hidden_layers * (3.0 * linear + 3.5 * scores + recomputed) + encoder
    return total


def _mean(values: Sequence[float], shares: Sequence[float]) -> float:
    return sum(value * share for value, share in zip(values, shares, strict=True)) / sum(shares)
