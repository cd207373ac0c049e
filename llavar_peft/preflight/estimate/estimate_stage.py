"""A stage's estimate, and which settings would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from llavar_peft.models.llavar_config import config_without_weights
from llavar_peft.preflight.estimate.estimate_memory import Memory, count, memory, trained
from llavar_peft.preflight.estimate.estimate_work import (
    RecordLengths,
    flops_per_step,
    largest_pass,
    measure_records,
    steps,
)
from llavar_peft.recipe.schema import Full, Lora, ModelConfig, Stage


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """What a stage will take.

    Attributes:
        stage: Its name.
        parameters: Of the model, adapters left out.
        trained: That the stage trains.
        memory: Of one GPU.
        lengths: Of its records.
        pass_tokens: Of the largest forward pass on a GPU.
        step_tokens: Of an optimizer step, over all GPUs.
        step_flops: Of an optimizer step, over all GPUs.
        steps: Of the whole stage; None where its records are not here.
    """

    stage: str
    parameters: int
    trained: int
    memory: Memory
    lengths: RecordLengths
    pass_tokens: int
    step_tokens: float
    step_flops: float
    steps: int | None


def estimate_stage(model: ModelConfig, stage: Stage, *, gpus: int = 1, sharded: bool | None = None) -> StageEstimate:
    """Estimate a stage without opening a weight.

    Args:
        model: Where the model comes from and how it is stored.
        stage: The stage.
        gpus: Number of them.
        sharded: Whether the model is divided over them (FSDP, ZeRO-3); None does so with several.

    Returns:
        The estimate, for GPUs that have bfloat16.

    Raises:
        ConfigError: The model's shape cannot be told.
        DataError: The records are there and cannot be read.
    """
    config = config_without_weights(model)
    lengths = measure_records(stage, config)
    counts = count(config, stage.tune)
    tokens = largest_pass(stage, lengths)
    # At most what is not image: about a text's prompts and answers together.
    spoken = max(1, round(tokens * (1 - lengths.images * config.image_seq_length / max(lengths.mean, 1.0))))
    return StageEstimate(
        stage=stage.name,
        parameters=counts.whole,
        trained=trained(config, stage.tune, counts),
        memory=memory(
            config, model, stage, tokens=tokens, supervised=spoken, gpus=gpus,
            sharded=gpus > 1 if sharded is None else sharded,
        ),
        lengths=lengths,
        pass_tokens=tokens,
        step_tokens=stage.global_batch_size * lengths.mean,
        step_flops=flops_per_step(config, stage, counts, lengths),
        steps=steps(stage, lengths),
    )  # fmt: skip


def what_would_help(
    model: ModelConfig, stage: Stage, *, limit: int, gpus: int = 1, sharded: bool | None = None
) -> Iterator[tuple[str, int]]:
    """Changes one setting after the other until the stage fits.

    Args:
        model: Where the model comes from and how it is stored.
        stage: A stage that does not fit.
        limit: Bytes that it may take.
        gpus: Number of them.
        sharded: As for ``estimate_stage``.

    Yields:
        What to set, and the peak with that and all before it; the last one fits, if any does.
    """
    for what, model, stage in _changes(model, stage):  # noqa: B020, PLR1704 - each goes on from the one before
        peak = estimate_stage(model, stage, gpus=gpus, sharded=sharded).memory.peak
        yield what, peak
        if peak <= limit:
            return


def _changes(model: ModelConfig, stage: Stage) -> Iterator[tuple[str, ModelConfig, Stage]]:
    """First those that change no result."""
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
