"""Translate a stage's settings into ``transformers.TrainingArguments``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
import transformers

from llavar_peft.compat.usable_cores import usable_cores
from llavar_peft.errors import ConfigError, MissingDependencyError
from llavar_peft.models.launch_environment import requested_sharding, uses_deepspeed, uses_gpu
from llavar_peft.recipe.schema import Optimizer, Precision, Recipe, Stage
from llavar_peft.training.launch import compute_dtype, uses_cpu

# Renamed in transformers 5.24.
_RECOMPUTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in transformers.TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)
_TRACKERS = {
    "azure_ml": "azureml-core", "clearml": "clearml", "codecarbon": "codecarbon", "comet_ml": "comet-ml",
    "dagshub": "dagshub", "dvclive": "dvclive", "flyte": "flytekit", "mlflow": "mlflow", "neptune": "neptune",
    "swanlab": "swanlab", "tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb",
}  # fmt: skip
"""The package of each tracker that transformers can report to."""
_OPTIMIZERS = {"adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}

_LAUNCHED_PRECISION = "ACCELERATE_MIXED_PRECISION"


class StageArguments(transformers.TrainingArguments):
    """Arguments of one process on one device, in the stage's precision."""

    def __post_init__(self) -> None:
        # Neither bf16 nor fp16 means float32, but transformers takes the precision of the launch configuration then.
        launched = os.environ.pop(_LAUNCHED_PRECISION, None)
        try:
            super().__post_init__()
        finally:
            if launched is not None:
                os.environ[_LAUNCHED_PRECISION] = launched

    @property
    def n_gpu(self) -> int:
        """The number of GPUs that this process uses: at most one, however many it sees.

        ``transformers`` would use all of them, in micro batches that are as many times larger than the stage's.
        """
        seen: int = super().n_gpu
        return min(seen, 1)


def training_arguments(recipe: Recipe, stage: Stage, directory: Path, *, ranks: int) -> transformers.TrainingArguments:
    """Build the arguments of a stage, with exactly the stage's global batch.

    Raises:
        ConfigError: The global batch does not divide by micro batch times ranks.
    """
    accumulated = micro_batches(stage, ranks=ranks)
    cuda = uses_gpu()
    precision = resolve_precision(stage.precision)
    optim = stage.optim
    return StageArguments(
        output_dir=str(directory),
        run_name=f"{Path(recipe.output_dir).name}-{stage.name}",
        per_device_train_batch_size=stage.micro_batch_size,
        gradient_accumulation_steps=accumulated,
        num_train_epochs=stage.epochs,
        max_steps=stage.max_steps if stage.max_steps is not None else -1,
        learning_rate=optim.learning_rate,
        lr_scheduler_type=optim.schedule,
        warmup_steps=optim.warmup_ratio,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_epsilon=optim.epsilon,
        optim=optimizer_name(optim.optimizer, precision, device="cuda" if cuda else "cpu"),
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        tf32=True if cuda and precision != "fp32" and torch.cuda.get_device_capability()[0] >= 8 else None,
        use_cpu=uses_cpu(),
        dataloader_num_workers=_image_workers(stage),
        dataloader_pin_memory=cuda,
        accelerator_config={
            "non_blocking": not uses_cpu(),  # otherwise the host waits for the device with each tensor of a batch
            "gradient_accumulation_kwargs": {"sync_each_batch": requested_sharding() == "fsdp2"},
        },
        save_strategy="steps" if stage.save_every_steps else "no",
        save_steps=stage.save_every_steps or 500,
        logging_strategy="no",  # StageTrainer writes the log
        logging_nan_inf_filter=False,
        report_to=list(recipe.report_to) or "none",
        seed=recipe.seed,
        data_seed=recipe.seed,
        remove_unused_columns=False,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        ddp_timeout=recipe.process_timeout,
        log_level="error",
        **{
            _RECOMPUTING: bool(stage.gradient_checkpointing),
            f"{_RECOMPUTING}_kwargs": {"use_reentrant": False} if stage.gradient_checkpointing else None,
        },
    )


def _image_workers(stage: Stage) -> int:
    """Return the number of processes that open images: more than there are cores for each rank would be slower."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return min(stage.data.workers, max(1, usable_cores() // ranks))


def check_trackers(recipe: Recipe) -> None:
    """Check, before a model is loaded, that what the run reports to, optimizes and shards with is installed.

    Raises:
        ConfigError: transformers knows no tracker of this name.
        MissingDependencyError: The package of a tracker, an optimizer or DeepSpeed is not installed.
    """
    if uses_deepspeed() and importlib.util.find_spec("deepspeed") is None:
        raise MissingDependencyError.at(
            "accelerate", "its configuration asks for DeepSpeed, which is not installed",
            "pip install 'llavar-peft[deepspeed]', or use examples/accelerate/fsdp2_8gpu.yaml",
        )  # fmt: skip
    for stage in recipe.stages:
        if stage.optim.optimizer != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
            raise MissingDependencyError.at(
                f"stages.{stage.name}.optim.optimizer",
                f"{stage.optim.optimizer} needs bitsandbytes, which is not installed",
                "pip install bitsandbytes, or use adamw",
            )
    from transformers.integrations import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    for name in recipe.report_to:
        if name in ("all", "none") or name in available:
            continue
        package = _TRACKERS.get(name)
        if package is None:
            known = ", ".join(sorted(_TRACKERS))
            raise ConfigError.at("report_to", f"unknown tracker (got {name!r}, expected one of {known})", "correct it")
        raise MissingDependencyError.at("report_to", f"{name} is not installed", f"pip install {package}")


def optimizer_name(optimizer: Optimizer, precision: str, *, device: str) -> str:
    """Return transformers' name of an optimizer.

    On a CUDA device AdamW is fused: the default there, ``foreach``, needs 4 more bytes per trained weight in each step.
    On a CPU the default is a loop without such memory, whose results released versions had. With fp16 it stays the
    default everywhere, because the fused kernel itself skips a step whose gradient overflows: accelerate would not
    notice, and the learning rate would follow a schedule that is ahead by one step.

    Args:
        optimizer: The recipe's setting.
        precision: As ``resolve_precision`` returns it.
        device: Type of the device that is trained on.
    """
    fused = optimizer == "adamw" and device == "cuda" and precision != "fp16"
    return "adamw_torch_fused" if fused else _OPTIMIZERS[optimizer]


def resolve_precision(precision: Precision) -> str:
    """Return the precision, with ``auto`` resolved to the 16-bit format that suits the GPU, without a GPU to fp32."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(compute_dtype(precision) or torch.float32, "fp32")


def micro_batches(stage: Stage, *, ranks: int) -> int:
    """Return the number of micro batches of one rank in each optimizer step.

    Raises:
        ConfigError: The global batch does not divide by micro batch times ranks.
    """
    per_step = stage.micro_batch_size * ranks
    if stage.global_batch_size % per_step:
        raise ConfigError.at(
            f"stages.{stage.name}.global_batch_size",
            f"is not a multiple of micro_batch_size x ranks (got {stage.global_batch_size}, expected a multiple of "
            f"{stage.micro_batch_size} x {ranks})",
            f"use a multiple of {per_step}, or a smaller micro_batch_size",
        )
    return stage.global_batch_size // per_step
