"""Stages with the paper's numbers; the functions behind the shipped recipes.

Source of the defaults: LLaVAR (arXiv 2306.17107), scripts/pretrain and scripts/finetune; where a default is another's,
its docstring says so.
"""

from __future__ import annotations

from llavar_peft.recipe.schema import (
    DataConfig,
    Full,
    Lora,
    LoraBias,
    LoraTarget,
    LoraVariant,
    OptimConfig,
    Precision,
    ProbeConfig,
    Projector,
    Recompute,
    Stage,
)


def projector_pretraining(
    data: DataConfig,
    *,
    name: str = "pretrain",
    epochs: float = 1.0,
    max_steps: int | None = None,
    learning_rate: float = 2e-3,
    global_batch_size: int = 128,
    micro_batch_size: int = 8,
    max_length: int = 1024,
    precision: Precision = "auto",
    gradient_checkpointing: Recompute = True,
    save_every_steps: int | None = None,
    probe: ProbeConfig | None = None,
) -> Stage:
    """Make stage 1: the projector and the ``<im_start>``/``<im_end>`` input rows learn, all else is frozen.

    Any field that has no argument here is set with ``dataclasses.replace(stage, ...)``.

    Args:
        data: Records and images; the paper's are 595K captions and 422K OCR records.
        name: Folder of the stage's results.
        epochs: Passes over the records.
        max_steps: Stops after this many optimizer steps.
        learning_rate: Peak learning rate.
        global_batch_size: Records per optimizer step (the paper: 8 GPUs x 8 x 2 accumulation).
        micro_batch_size: Records per forward pass and rank.
        max_length: Tokens per record.
        precision: Number format of the arithmetic; the paper's is bf16.
        gradient_checkpointing: Whether activations are computed again in the backward pass, to save memory, or "auto".
        save_every_steps: Optimizer steps between two checkpoints.
        probe: What is looked at while training.

    Returns:
        The stage.
    """
    return Stage(
        name=name,
        data=data,
        tune=Projector(),
        optim=OptimConfig(learning_rate=learning_rate),
        epochs=epochs,
        max_steps=max_steps,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        max_length=max_length,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        save_every_steps=save_every_steps,
        probe=probe or ProbeConfig(),
    )


def full_finetuning(
    data: DataConfig,
    *,
    name: str = "finetune",
    epochs: float = 3.0,
    max_steps: int | None = None,
    learning_rate: float = 2e-5,
    global_batch_size: int = 32,
    micro_batch_size: int = 4,
    max_length: int = 2048,
    precision: Precision = "auto",
    gradient_checkpointing: Recompute = True,
    save_every_steps: int | None = None,
    probe: ProbeConfig | None = None,
) -> Stage:
    """Make stage 2: the projector and the whole language model learn, the vision tower is frozen.

    Any field that has no argument here is set with ``dataclasses.replace(stage, ...)``.

    Args:
        data: Records and images; the paper's are 158K LLaVA-Instruct and 16K LLaVAR conversations.
        name: Folder of the stage's results.
        epochs: Passes over the records.
        max_steps: Stops after this many optimizer steps.
        learning_rate: Peak learning rate.
        global_batch_size: Records per optimizer step (the paper: 8 GPUs x 4 x 1).
        micro_batch_size: Records per forward pass and rank.
        max_length: Tokens per record.
        precision: Number format of the arithmetic; the paper's is bf16.
        gradient_checkpointing: Whether activations are computed again in the backward pass, to save memory, or "auto".
        save_every_steps: Optimizer steps between two checkpoints.
        probe: What is looked at while training.

    Returns:
        The stage.
    """
    return Stage(
        name=name,
        data=data,
        tune=Full(),
        optim=OptimConfig(learning_rate=learning_rate),
        epochs=epochs,
        max_steps=max_steps,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        max_length=max_length,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        save_every_steps=save_every_steps,
        probe=probe or ProbeConfig(),
    )


def lora(
    data: DataConfig,
    *,
    rank: int = 64,
    alpha: float = 128.0,
    dropout: float = 0.05,
    target: LoraTarget | tuple[str, ...] = "all-linear",
    bias: LoraBias = "none",
    variant: LoraVariant = "lora",
    train_projector: bool = True,
    train_image_rows: bool | None = None,
    name: str = "lora",
    epochs: float = 3.0,
    max_steps: int | None = None,
    learning_rate: float = 2e-4,
    projector_learning_rate: float | None = None,
    rows_learning_rate: float | None = None,
    global_batch_size: int = 32,
    micro_batch_size: int = 4,
    max_length: int = 2048,
    precision: Precision = "auto",
    gradient_checkpointing: Recompute = True,
    save_every_steps: int | None = None,
    probe: ProbeConfig | None = None,
) -> Stage:
    """Make a stage that trains low-rank adapters; with ``ModelConfig(quantize="nf4")`` this is QLoRA.

    The paper has no LoRA: batch, epochs and length are its stage 2's, the learning rate is LLaVA v1.5's
    (scripts/v1_5/finetune_lora.sh). Any field without an argument is set with ``dataclasses.replace(stage, ...)``.

    Args:
        data: Records and images.
        rank: Rank of the update.
        alpha: The update is scaled by alpha / rank (by alpha / sqrt(rank) for rslora).
        dropout: Dropout on the adapter's input.
        target: The language model's layers that get adapters, by group or by name.
        bias: Whether each adapter has a bias, which cannot be merged.
        variant: Which of peft's variants.
        train_projector: Whether the projector is trained in full beside the adapters.
        train_image_rows: Whether the ``<im_start>``/``<im_end>`` rows are trained too; None where nothing has yet.
        name: Folder of the stage's results.
        epochs: Passes over the records.
        max_steps: Stops after this many optimizer steps.
        learning_rate: Peak learning rate of the adapters.
        projector_learning_rate: The projector's own, where it differs (LLaVA v1.5: 2e-5).
        rows_learning_rate: That of the rows, where it differs.
        global_batch_size: Records per optimizer step.
        micro_batch_size: Records per forward pass and rank.
        max_length: Tokens per record.
        precision: Number format of the arithmetic.
        gradient_checkpointing: Whether activations are computed again in the backward pass, to save memory, or "auto".
        save_every_steps: Optimizer steps between two checkpoints.
        probe: What is looked at while training.

    Returns:
        The stage.
    """
    return Stage(
        name=name,
        data=data,
        tune=Lora(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            target=target,
            bias=bias,
            variant=variant,
            train_projector=train_projector,
            train_image_rows=train_image_rows,
        ),
        optim=OptimConfig(
            learning_rate=learning_rate,
            projector_learning_rate=projector_learning_rate,
            rows_learning_rate=rows_learning_rate,
        ),
        epochs=epochs,
        max_steps=max_steps,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        max_length=max_length,
        precision=precision,
        gradient_checkpointing=gradient_checkpointing,
        save_every_steps=save_every_steps,
        probe=probe or ProbeConfig(),
    )
