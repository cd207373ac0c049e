"""A run is a value: frozen dataclasses without behaviour.

YAML and Python spell the same value. Validation happens at one place, ``llavar_peft.recipe.validate.validate_recipe``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from llavar_peft.types import ImageMode

Quantization = Literal["nf4", "int8"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "flash_attention_2", "sdpa", "eager"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
BadImagePolicy = Literal["stop", "skip"]
LossAverage = Literal["micro_batch", "token"]
LoraVariant = Literal["lora", "rslora", "dora", "pissa"]
LoraTarget = Literal["all-linear", "attention", "mlp"]
LoraBias = Literal["none", "lora"]
Recompute = bool | Literal["auto"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the model comes from and how its base is stored.

    Either ``language_model`` and ``vision_tower`` (a new LLaVAR from its parts), or ``checkpoint`` (one of ours; or one
    in the released layout, and then ``vision_tower`` says where the tower is taken from).
    """

    language_model: str | None = None
    """Folder (or hub name) of a LLaMA or Vicuna."""
    vision_tower: str | None = None
    """Folder (or hub name) of a CLIP vision tower with its ``preprocessor_config.json``."""
    checkpoint: str | None = None
    """Folder (or hub name) of a LLaVAR checkpoint, ours or in the released layout."""
    projector: str | None = None
    """A stage-1 ``mm_projector.bin`` or ``.safetensors`` laid over the model."""
    quantize: Quantization | None = None
    """How the language model's linear layers are stored; tower, projector, embeddings and ``lm_head`` never are."""
    dtype: Dtype = "auto"
    """Of the weights in memory: ``auto`` is bfloat16 on a GPU that has it, else float32."""
    attention: Attention = "auto"
    """``auto`` takes flash-attention where it is installed and possible, else PyTorch's SDPA."""
    image_mode: ImageMode = "pad"
    """Preparation of images in training, for a model from parts. Source: LLaVAR, ``--image_aspect_ratio pad``."""
    use_im_start_end: bool = True
    """Whether images stand between ``<im_start>`` and ``<im_end>``. Source: LLaVAR, ``--mm_use_im_start_end``."""
    vision_feature_layer: int = -2
    """Which hidden state of the tower is projected. Source: LLaVAR, ``--mm_vision_select_layer``."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Records and the images they name."""

    records: str | tuple[str, ...]
    """One or more files in the released format: JSON, JSONL, Parquet, or a folder written by ``datasets``."""
    images: str | tuple[str, ...] = ()
    """Folders that the records' image paths are looked up in, in this order."""
    image_mode: ImageMode | None = None
    """Overrides the processor's training mode."""
    on_bad_image: BadImagePolicy = "stop"
    """What a missing or broken image does to the run."""
    max_bad_share: float = 0.01
    """Share of records that may be skipped (bad images), or dropped (no label left), before the run stops."""
    holdout: float = 0.0
    """Share of records (or, from 1 up, their number) kept out of training for the held-out loss and the OCR probe."""
    shuffle: bool = True
    """Whether each epoch has its own order, drawn from (seed, epoch)."""
    workers: int = 4
    """Processes that open images, per rank."""


@dataclass(frozen=True, kw_only=True)
class Projector:
    """Trains the projector and the ``<im_start>``/``<im_end>`` input rows, and nothing else (stage 1)."""

    type: Literal["projector"] = "projector"


@dataclass(frozen=True, kw_only=True)
class Full:
    """Trains the projector and the whole language model; the tower stays frozen (stage 2)."""

    type: Literal["full"] = "full"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Trains low-rank adapters on the language model's linear layers, and the projector in full."""

    type: Literal["lora"] = "lora"
    rank: int = 64
    """Rank r of the update B A."""
    alpha: float = 128.0
    """The update is scaled by alpha / r (by alpha / sqrt(r) for rslora)."""
    dropout: float = 0.05
    """Dropout on the adapter's input."""
    variant: LoraVariant = "lora"
    """Which of peft's variants."""
    target: LoraTarget | tuple[str, ...] = "all-linear"
    """The language model's layers that get adapters: by group, or by name as in [q_proj, v_proj]. Never the tower's."""
    bias: LoraBias = "none"
    """``lora`` trains a bias in each adapter; such an adapter cannot be merged, for LLaMA's layers have no biases."""
    train_projector: bool = True
    """Whether the projector is trained in full beside the adapters."""
    train_image_rows: bool | None = None
    """Whether the ``<im_start>``/``<im_end>`` rows are trained too; None trains them where nothing has yet."""


Tune = Projector | Full | Lora


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule. Defaults: LLaVAR, both training scripts."""

    learning_rate: float
    """Peak learning rate."""
    projector_learning_rate: float | None = None
    """The projector's own, where it differs."""
    rows_learning_rate: float | None = None
    """That of the ``<im_start>``/``<im_end>`` rows, where they are trained apart and it differs."""
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = 0.03
    """Share of the steps over which the rate rises from 0."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are clipped to this total L2 norm. Source: the Trainer's default, which the original keeps."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What is looked at while training: held-out loss, and reading a few held-out images."""

    every_steps: int = 0
    """Optimizer steps between two looks; 0 looks only at a stage's start and end."""
    images: int = 8
    """Number of held-out images that are read aloud (greedy)."""
    loss_records: int = 64
    """Number of held-out records that the held-out loss is averaged over."""
    max_new_tokens: int = 64


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a run: what trains, on what, how."""

    name: str
    """Folder of its results under ``output_dir``."""
    data: DataConfig
    tune: Tune = field(default_factory=Full)
    optim: OptimConfig
    epochs: float = 1.0
    """Passes over the records."""
    max_steps: int | None = None
    """Stops after this many optimizer steps, whatever ``epochs`` says."""
    global_batch_size: int
    """Records per optimizer step, over all ranks and accumulation."""
    micro_batch_size: int
    """Records per forward pass and rank."""
    packing: bool = True
    """Whether the records of a forward pass lie end to end in one row, each attending to itself, instead of padded."""
    balance: bool = True
    """Whether a step's records are divided so that its micro batches have about as many tokens each; else as drawn."""
    max_tokens: int | None = None
    """Tokens per forward pass and rank: a larger micro batch runs in several, with the same loss. None is one pass."""
    max_length: int = 2048
    """Tokens per record, image tokens included; longer ones are truncated, never through an image."""
    loss_average: LossAverage = "micro_batch"
    """``micro_batch`` averages over each micro batch, then over those (the original); ``token`` over all tokens."""
    precision: Precision = "auto"
    """``auto`` is bf16 on a GPU that has it, else fp32."""
    gradient_checkpointing: Recompute = False
    """Whether activations are computed again in the backward pass, to save memory; ``auto``: in as many layers as each
    batch and the free memory ask for."""
    save_every_steps: int | None = None
    """Optimizer steps between two checkpoints; None saves at the end only (and on interruption)."""
    keep_checkpoints: int = 1
    """How many of them are kept."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run."""

    model: ModelConfig
    stages: tuple[Stage, ...]
    output_dir: str
    seed: int = 0
    report_to: tuple[str, ...] = ()
    """Trackers by their name in transformers: ``tensorboard``, ``wandb``, ``mlflow``, ..."""

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid", "strict": True}
