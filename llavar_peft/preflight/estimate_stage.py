"""The estimate of a stage, and the settings that would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llavar_peft.models.config_without_weights import config_without_weights
from llavar_peft.models.packing_probe import keeps_segments_apart
from llavar_peft.preflight.estimate_compute import (
    RecordLengths,
    count_steps,
    flops_per_step,
    largest_pass,
    measure_records,
)
from llavar_peft.preflight.estimate_counts import count_parameters, count_trained
from llavar_peft.preflight.estimate_layer import computes_scores
from llavar_peft.preflight.estimate_memory import Memory, estimate_memory
from llavar_peft.preflight.estimate_views import image_cost, tokens_by_tiles
from llavar_peft.recipe.schema import Full, Lora, ModelConfig, Stage


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """The resources that a stage needs.

    Attributes:
        stage: The stage's name.
        parameters: Number of parameters of the model, without adapters.
        trained: Number of parameters that the stage trains.
        memory: Memory of one GPU.
        lengths: Lengths of the stage's records.
        image_tokens: Tokens of an image; with tiles, the largest number.
        grid_tokens: With tiles, the least and the most tokens of an image by the number of its tiles.
        pass_tokens: Tokens of the largest forward pass on a GPU.
        step_tokens: Tokens of an optimizer step, over all GPUs.
        step_flops: Floating point operations of an optimizer step, over all GPUs.
        steps: Number of optimizer steps; None if the records are missing.
    """

    stage: str
    parameters: int
    trained: int
    memory: Memory
    lengths: RecordLengths
    image_tokens: int
    grid_tokens: dict[int, tuple[int, int]]
    pass_tokens: int
    step_tokens: float
    step_flops: float
    steps: int | None


def estimate_stage(model: ModelConfig, stage: Stage, *, gpus: int = 1, sharded: bool | None = None) -> StageEstimate:
    """Estimate a stage without reading weights, for GPUs that support bfloat16.

    Args:
        model: Where the model comes from and how it is stored.
        stage: The stage.
        gpus: Number of GPUs.
        sharded: Whether the model is sharded over them (FSDP, ZeRO-3); None shards it over several GPUs.

    Raises:
        ConfigError: The model's shape is unknown.
        DataError: The records exist and cannot be read.
    """
    config = config_without_weights(model)
    lengths = measure_records(stage, config)
    counts = count_parameters(config, stage.tune)
    packs = not computes_scores(config.text_config, model.attention) and keeps_segments_apart(config.text_config)
    tokens = largest_pass(stage, lengths, packs=packs)
    # An upper bound: all text, of which only the answers are supervised.
    supervised = max(1, round(tokens * (1 - lengths.image_tokens / max(lengths.mean, 1.0))))
    return StageEstimate(
        stage=stage.name,
        parameters=counts.whole,
        trained=count_trained(config, stage.tune, counts),
        memory=estimate_memory(
            config, model, stage, tokens=tokens, supervised=supervised, gpus=gpus,
            sharded=gpus > 1 if sharded is None else sharded, counts=counts,
        ),
        lengths=lengths,
        image_tokens=image_cost(config, stage.max_length).tokens,
        grid_tokens=tokens_by_tiles(config),
        pass_tokens=tokens,
        step_tokens=stage.global_batch_size * lengths.mean,
        step_flops=flops_per_step(config, stage, counts, lengths),
        steps=count_steps(stage, lengths),
    )  # fmt: skip


def what_would_help(
    model: ModelConfig, stage: Stage, *, limit: int, gpus: int = 1, sharded: bool | None = None
) -> Iterator[tuple[str, int]]:
    """Change one setting after the other until the stage fits.

    Args:
        model: Where the model comes from and how it is stored.
        stage: A stage that does not fit.
        limit: Available memory of a GPU, in bytes.
        gpus: Number of GPUs.
        sharded: As for ``estimate_stage``.

    Yields:
        The setting, and the peak memory with it and all before it; the last one fits, if any does.
    """
    for setting, changed_model, changed_stage in _changes(model, stage):
        peak = estimate_stage(changed_model, changed_stage, gpus=gpus, sharded=sharded).memory.peak
        yield setting, peak
        if peak <= limit:
            return


def _changes(model: ModelConfig, stage: Stage) -> Iterator[tuple[str, ModelConfig, Stage]]:
    """Yield cumulative changes; those that do not change the result of training come first."""
    if stage.gradient_checkpointing is False:
        stage = replace(stage, gradient_checkpointing=True)
        yield "gradient_checkpointing: true", model, stage
    if stage.micro_batch_size > 1 and stage.packing and (stage.max_tokens or 1 << 62) > stage.max_length:
        stage = replace(stage, max_tokens=stage.max_length)
        yield f"max_tokens: {stage.max_length}", model, stage
    while stage.micro_batch_size > 1 and not stage.packing:
        stage = replace(stage, micro_batch_size=stage.micro_batch_size // 2)
        yield f"micro_batch_size: {stage.micro_batch_size}", model, stage
    if stage.optim.optimizer == "adamw":
        stage = replace(stage, optim=replace(stage.optim, optimizer="paged_adamw_8bit"))
        yield "optim.optimizer: paged_adamw_8bit", model, stage
    if isinstance(stage.tune, Full):
        stage = replace(stage, tune=Lora())
        yield "tune: lora", model, stage
    if model.quantize is None:
        model = replace(model, quantize="nf4")
        yield "model.quantize: nf4", model, stage
    if stage.max_length > 1024:
        stage = replace(stage, max_length=1024, max_tokens=1024 if stage.max_tokens else None)
        yield "max_length: 1024", model, stage
