"""Functions that build stages with the paper's settings.

Source of the defaults: LLaVAR (arXiv 2306.17107), scripts/pretrain and scripts/finetune, unless stated otherwise.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from llavar_peft.recipe.schema import (
    DataConfig,
    Full,
    LinearLayer,
    Lora,
    LoraBias,
    LoraTarget,
    LoraVariant,
    LossAverage,
    OptimConfig,
    Optimizer,
    Precision,
    ProbeConfig,
    Projector,
    Schedule,
    Stage,
    Tune,
)
from llavar_peft.recipe.schema_fields import nearest
from llavar_peft.recipe.schema_types import Recompute

if TYPE_CHECKING:
    from typing_extensions import Unpack

Function = TypeVar("Function", bound=Callable[..., Stage])


class StageOptions(TypedDict, total=False):
    """Options of a stage: the fields of ``Stage`` and ``OptimConfig``, which explain them."""

    name: str
    epochs: float
    max_steps: int | None
    global_batch_size: int
    micro_batch_size: int
    packing: bool
    balance: bool
    max_tokens: int | None
    max_length: int
    loss_average: LossAverage
    precision: Precision
    fp32_reduction: bool
    gradient_checkpointing: Recompute
    save_every_steps: int | None
    keep_checkpoints: int
    probe: ProbeConfig | None
    learning_rate: float
    projector_learning_rate: float | None
    rows_learning_rate: float | None
    schedule: Schedule
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    beta1: float
    beta2: float
    epsilon: float
    optimizer: Optimizer


class FullOptions(StageOptions, total=False):
    """Options of a full stage: in addition the fields of ``Full``."""

    train_tower: bool
    tower_learning_rate: float | None


class LoraOptions(StageOptions, total=False):
    """Options of a LoRA stage: in addition the fields of ``Lora``."""

    rank: int
    alpha: float
    dropout: float
    variant: LoraVariant
    target: LoraTarget | tuple[LinearLayer, ...]
    bias: LoraBias
    train_projector: bool
    train_image_rows: bool | None
    tower_rank: int | None
    tower_learning_rate: float | None


_PRETRAINING: StageOptions = {
    "name": "pretrain",
    "learning_rate": 2e-3,
    "epochs": 1.0,
    "global_batch_size": 128,  # 8 GPUs x 8 x 2 accumulation steps
    "micro_batch_size": 8,
    "max_length": 1024,
    "gradient_checkpointing": True,
}
_FINETUNING: StageOptions = {
    "name": "finetune",
    "learning_rate": 2e-5,
    "epochs": 3.0,
    "global_batch_size": 32,  # 8 GPUs x 4 x 1
    "micro_batch_size": 4,
    "max_length": 2048,
    "gradient_checkpointing": True,
}
# The paper has no LoRA: the learning rate is that of LLaVA v1.5, scripts/v1_5/finetune_lora.sh.
_LORA: StageOptions = {**_FINETUNING, "name": "lora", "learning_rate": 2e-4}


def _signature(options: type, defaults: Mapping[str, Any]) -> Callable[[Function], Function]:
    """Give a function the signature that lists its options and their defaults, for ``help`` and editors."""

    def decorate(function: Function) -> Function:
        keyword = inspect.Parameter.KEYWORD_ONLY
        values = {
            **_defaults(Stage),
            **_defaults(OptimConfig),
            **_defaults(Full),
            **_defaults(Lora),
            "probe": None,
            **defaults,
        }
        data = inspect.Parameter("data", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=DataConfig)
        function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [data]
            + [
                inspect.Parameter(name, keyword, default=values[name], annotation=hint)
                for name, hint in typing.get_type_hints(options).items()
            ],
            return_annotation=Stage,
        )
        return function

    return decorate


def _defaults(cls: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(cls)}


@_signature(StageOptions, _PRETRAINING)
def projector_pretraining(data: DataConfig, **options: Unpack[StageOptions]) -> Stage:
    """Build stage 1: the projector and the ``<im_start>`` and ``<im_end>`` input embeddings are trained.

    Args:
        data: Records and images; the paper's are 595K captions and 422K OCR records.
        options: Fields of ``Stage`` and ``OptimConfig``.

    Raises:
        TypeError: An option is unknown.
    """
    return _build_stage("projector_pretraining", _keep_all(data), Projector, StageOptions, {**_PRETRAINING, **options})


@_signature(FullOptions, _FINETUNING)
def full_finetuning(data: DataConfig, **options: Unpack[FullOptions]) -> Stage:
    """Build stage 2: the projector and the whole language model are trained, the vision tower only if asked for.

    Args:
        data: Records and images; the paper's are 158K LLaVA-Instruct and 16K LLaVAR conversations.
        options: Fields of ``Full``, ``Stage`` and ``OptimConfig``.

    Raises:
        TypeError: An option is unknown.
    """
    return _build_stage("full_finetuning", _keep_all(data), Full, FullOptions, {**_FINETUNING, **options})


@_signature(LoraOptions, _LORA)
def lora(data: DataConfig, **options: Unpack[LoraOptions]) -> Stage:
    """Build a stage that trains low-rank adapters; with ``ModelConfig(quantize="nf4")`` this is QLoRA.

    The paper has no LoRA: batch size, epochs and length are those of its stage 2, the learning rate is that of LLaVA
    v1.5 (scripts/v1_5/finetune_lora.sh), which trains the projector with ``projector_learning_rate=2e-5``.

    Args:
        data: Records and images.
        options: Fields of ``Lora``, ``Stage`` and ``OptimConfig``.

    Raises:
        TypeError: An option is unknown.
    """
    return _build_stage("lora", data, Lora, LoraOptions, {**_LORA, **options})


def _keep_all(data: DataConfig) -> DataConfig:
    """Return the data of a stage of the paper, which holds out no records, unless a number is given."""
    return dataclasses.replace(data, holdout=0.0) if data.holdout is None else data


def _build_stage(function: str, data: DataConfig, tune: type[Tune], known: type, options: Mapping[str, Any]) -> Stage:
    """Distribute options over the dataclasses that have these fields."""
    names = list(typing.get_type_hints(known))
    for name in options:
        if name not in names:
            near = nearest(name, names)
            fix = f"did you mean {near!r}?" if near else f"the options are {', '.join(names)}"
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}; {fix}")
    given = {name: value for name, value in options.items() if name != "probe" or value is not None}

    def fields(cls: type) -> dict[str, Any]:
        return {field.name: given[field.name] for field in dataclasses.fields(cls) if field.name in given}

    return Stage(data=data, tune=tune(**fields(tune)), optim=OptimConfig(**fields(OptimConfig)), **fields(Stage))
