"""The recipe: a whole training run as one value, made of frozen dataclasses without behavior.

YAML and Python describe the same value. Each field declares its constraints in its type and is explained once, in the
docstring under it. Python does not check types or constraints on construction; ``validate.validate_recipe`` does.
Constraints that involve several fields are in ``schema_rules``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Tag
from pydantic_core import PydanticCustomError

from llavar_peft.recipe.resolution import Resolution
from llavar_peft.recipe.schema_types import (
    BY_KIND,
    IntegerFromZero,
    NumberFromZero,
    PathOrFilledList,
    PathOrList,
    PathText,
    PositiveInteger,
    PositiveNumber,
    Recompute,
    Share,
    ShareBelowOne,
    StrictFields,
    Text,
)
from llavar_peft.types import BadImagePolicy, ImageMode, Quantization, TemplateName

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["auto", "flash_attention_2", "sdpa", "eager"]
Kernels = Literal["none", "liger", "compile"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
LossAverage = Literal["micro_batch", "token"]
LoraVariant = Literal["lora", "rslora", "dora", "pissa"]
LoraTarget = Literal["all-linear", "attention", "mlp"]
LoraBias = Literal["none", "lora"]
ProjectorType = Literal["linear", "mlp2x_gelu"]
LinearLayer = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _whole_from_one(value: float) -> float:
    if value > 1 and value != int(value):
        raise PydanticCustomError("holdout", "expected a share up to 1 or a whole number of records")
    return value


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelConfig(StrictFields):
    """Where the model comes from and how its weights are stored.

    Set either ``language_model`` and ``vision_tower`` for a new LLaVAR, or ``checkpoint`` for an existing one. A
    checkpoint in the released layout does not contain the vision tower and needs ``vision_tower`` as well.
    """

    language_model: PathText | None = None
    """Folder or hub name of a language model: Vicuna, Llama, Qwen, Mistral or another decoder."""
    vision_tower: PathText | None = None
    """Folder or hub name of a vision tower with its ``preprocessor_config.json``: CLIP, SigLIP, DINOv2 or another whose
    features form a grid of patches."""
    projector_type: ProjectorType = "linear"
    """The projector of a model that is built from parts: one linear layer, or two with a GELU between them. Source:
    LLaVAR; LLaVA-1.5, ``--mm_projector_type``."""
    checkpoint: PathText | None = None
    """Folder or hub name of a LLaVAR or LLaVA checkpoint: in this package's layout, in LLaVA's own, or in that of stock
    transformers."""
    projector: PathText | None = None
    """A stage-1 file, ``mm_projector.bin`` or ``.safetensors``, that replaces the projector's weights."""
    quantize: Quantization | None = None
    """Storage of the language model's linear layers. Vision tower, projector, embeddings and ``lm_head`` are never
    quantized."""
    dtype: Dtype = "auto"
    """Number format of the weights in memory; ``auto`` is bfloat16 on a GPU with bfloat16 arithmetic, float16 on
    an older one with float16 tensor cores (V100, T4), else float32."""
    attention: Attention = "auto"
    """Attention implementation; ``auto`` uses flash-attention where it is installed and supported, else PyTorch's
    SDPA."""
    kernels: Kernels = "none"
    """Kernels of the language model's layers: PyTorch's, Liger's (they need a GPU and the extra ``liger``), or those
    that ``torch.compile`` makes at the first step."""
    image_mode: ImageMode = "pad"
    """Image preparation in training, for a model built from parts. Source: LLaVAR, ``--image_aspect_ratio pad``."""
    template: TemplateName | None = None
    """How conversations are written, for a model built from parts: ``llava_v1``, ``vicuna_v1`` (LLaVA-1.5's), or
    ``chat``, the tokenizer's own chat template. None is ``llava_v1`` for a LLaMA or Vicuna with its
    ``tokenizer.model``, otherwise ``chat``."""
    use_im_start_end: bool = True
    """Whether ``<im_start>`` and ``<im_end>`` enclose each image, with the template ``llava_v1``; other templates never
    have them. Source: LLaVAR, ``--mm_use_im_start_end``."""
    vision_feature_layer: int = -2
    """The tower's hidden state that is projected. Source: LLaVAR, ``--mm_vision_select_layer``."""
    resolution: Resolution | None = None
    """How the model reads letters that are too small at the tower's size: ``tiles`` or ``cross_attention``, or a
    mapping with this ``type`` and its options. None leaves a checkpoint as it is, and gives a new model the whole image
    only."""


@dataclass(frozen=True, kw_only=True, repr=False)
class ColumnNames(StrictFields):
    """The names that the columns of a table, or the keys of records, have where they differ from the known ones.

    ``query.en`` is the key ``en`` of the column ``query``.
    """

    id: Text | None = None
    """The record's id."""
    image: Text | None = None
    """The image, or a list of images."""
    question: Text | None = None
    """The question."""
    answer: Text | None = None
    """The answer, or a list of answers, of which the most frequent one is used."""


@dataclass(frozen=True, kw_only=True, repr=False)
class DataSource(StrictFields):
    """One of several sources of training records."""

    records: PathOrFilledList
    """As in ``data.records``."""
    images: PathOrList = ()
    """Folders in which this source's image paths are searched; if empty, those of ``data.images``."""
    weight: PositiveNumber = 1.0
    """How often an epoch takes each record on average: 2 takes each twice, 0.5 another half of them in each epoch."""
    split: Text | None = None
    """As in ``data.split``."""
    config: Text | None = None
    """As in ``data.config``."""
    streaming: bool = False
    """As in ``data.streaming``."""
    columns: ColumnNames = field(default_factory=ColumnNames)
    """As in ``data.columns``."""


@dataclass(frozen=True, kw_only=True, repr=False)
class DataConfig(StrictFields):
    """The training records and their images. Set either ``records`` or ``sources``."""

    records: PathOrFilledList | None = None
    """One or more files (JSON, JSONL, Parquet, CSV, TSV), folders that ``datasets`` reads, or data sets of the Hugging
    Face hub, written ``hf://owner/name/config?split=train``."""
    images: PathOrList = ()
    """Folders in which the records' image paths are searched, in this order."""
    split: Text | None = None
    """Split of a folder or of a data set of the hub, such as ``train`` (if not set) or ``train[:1000]``."""
    config: Text | None = None
    """Configuration (subset) of a folder or of a data set of the hub, if it has several."""
    streaming: bool = False
    """Whether the rows of a data set of the hub are read one after the other into one Arrow file in the cache, instead
    of downloading its files first."""
    columns: ColumnNames = field(default_factory=ColumnNames)
    """The names of a table's columns, if they are not known ones."""
    sources: tuple[DataSource, ...] = ()
    """Several sources that are mixed by their weights, instead of ``records``."""
    image_mode: ImageMode | None = None
    """Image preparation in training, if it differs from the processor's."""
    on_bad_image: BadImagePolicy = "stop"
    """Whether a missing or unreadable image stops the run or skips its record."""
    max_bad_share: Share = 0.01
    """Share of records that may be skipped (unreadable image) or dropped (no supervised token left) before the run
    stops."""
    holdout: Annotated[NumberFromZero, AfterValidator(_whole_from_one)] | None = None
    """Share of records, or from 1 up their number, that is held out of training for the held-out loss and the probe;
    None holds out 2 % of 100 records or more, at most 64, and none of fewer."""
    shuffle: bool = True
    """Whether the records are shuffled in each epoch; the order depends on the seed and the epoch."""
    workers: IntegerFromZero = 4
    """Number of processes per rank that open images, limited to the CPU cores that the run may use."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Projector(StrictFields):
    """Train only the projector and the ``<im_start>`` and ``<im_end>`` input embeddings (stage 1)."""

    type: Literal["projector"] = "projector"
    """Selects this method."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Full(StrictFields):
    """Train the projector and the whole language model (stage 2), and the vision tower if it is asked for."""

    type: Literal["full"] = "full"
    """Selects this method."""
    train_tower: bool = False
    """Whether the vision tower is trained too, up to the layer whose output is projected. Source of the default:
    LLaVAR, which keeps the tower frozen."""
    tower_learning_rate: PositiveNumber | None = None
    """Peak learning rate of the vision tower; None is a fifth of ``optim.learning_rate``. Source: LLaVA-NeXT, which
    trains the tower with 2e-6 and everything else with 1e-5."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Lora(StrictFields):
    """Train low-rank adapters on the language model's linear layers, and the projector in full.

    With ``tower_rank``, the vision tower gets adapters too.
    """

    type: Literal["lora"] = "lora"
    """Selects this method."""
    rank: PositiveInteger = 64
    """Rank r of the update B A."""
    alpha: PositiveNumber = 128.0
    """The update is scaled by alpha / r, or by alpha / sqrt(r) for rslora."""
    dropout: ShareBelowOne = 0.05
    """Dropout on the adapter's input."""
    variant: LoraVariant = "lora"
    """LoRA variant, as implemented by peft."""
    target: Annotated[
        Annotated[LoraTarget, Tag("text")] | Annotated[tuple[LinearLayer, ...], Field(min_length=1), Tag("list")],
        BY_KIND,
    ] = "all-linear"
    """Layers of the language model that get adapters: a group, or a list of names such as [q_proj, v_proj]."""
    bias: LoraBias = "none"
    """``lora`` trains a bias in each adapter; such an adapter cannot be merged because LLaMA's layers have no bias."""
    train_projector: bool = True
    """Whether the projector is trained in full, in addition to the adapters."""
    train_image_rows: bool | None = None
    """Whether the ``<im_start>`` and ``<im_end>`` embeddings are trained; None trains them if they are untrained."""
    tower_rank: PositiveInteger | None = None
    """Rank of adapters on the linear layers of the vision tower, up to the layer whose output is projected; their
    updates are scaled as those of the language model. None adds none."""
    tower_learning_rate: PositiveNumber | None = None
    """Peak learning rate of the vision tower's adapters, if it differs from ``optim.learning_rate``."""


Tune = Annotated[Projector | Full | Lora, Field(discriminator="type")]


@dataclass(frozen=True, kw_only=True, repr=False)
class OptimConfig(StrictFields):
    """The optimizer and its schedule. Source of the defaults: both training scripts of LLaVAR."""

    learning_rate: PositiveNumber
    """Peak learning rate."""
    projector_learning_rate: PositiveNumber | None = None
    """Peak learning rate of the projector, if it differs."""
    rows_learning_rate: PositiveNumber | None = None
    """Peak learning rate of the ``<im_start>`` and ``<im_end>`` embeddings where they are trained separately, if it
    differs."""
    schedule: Schedule = "cosine"
    """Course of the learning rate after the warmup."""
    warmup_ratio: Share = 0.03
    """Share of the steps during which the learning rate rises from 0."""
    weight_decay: NumberFromZero = 0.0
    """Weight decay of AdamW; 0 disables it."""
    max_grad_norm: NumberFromZero = 1.0
    """Maximum L2 norm of all gradients together; 0 disables clipping. Source: the default of ``transformers.Trainer``,
    which LLaVAR keeps."""
    beta1: ShareBelowOne = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: ShareBelowOne = 0.999
    """AdamW's decay rate of the second moment."""
    epsilon: PositiveNumber = 1e-8
    """AdamW's term against division by zero."""
    optimizer: Optimizer = "adamw"
    """AdamW with its state in float32, in 8 bits, or in 8 bits paged to CPU memory when the GPU's is full."""


@dataclass(frozen=True, kw_only=True, repr=False)
class ProbeConfig(StrictFields):
    """Checks during training: the held-out loss, and the answers to some held-out images."""

    every_steps: IntegerFromZero = 0
    """Optimizer steps between two probes; 0 runs them only at the start and the end of a stage."""
    images: IntegerFromZero = 8
    """Number of held-out images to answer (greedy decoding)."""
    loss_records: PositiveInteger = 64
    """Number of held-out records over which the held-out loss is averaged."""
    max_new_tokens: PositiveInteger = 64
    """Maximum number of tokens per answer."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Stage(StrictFields):
    """One part of a run: what is trained, on which data, and how."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?$")]
    """Name of the folder of the stage's results under ``output_dir``."""
    data: DataConfig
    """The training records and their images."""
    tune: Tune = field(default_factory=Full)
    """What is trained: ``projector``, ``full`` or ``lora``; or a mapping with this ``type`` and its options."""
    optim: OptimConfig
    """The optimizer and its schedule."""
    epochs: PositiveNumber = 1.0
    """Number of passes over the records."""
    max_steps: PositiveInteger | None = None
    """Number of optimizer steps, instead of ``epochs``."""
    global_batch_size: PositiveInteger
    """Records per optimizer step, over all ranks and accumulation steps."""
    micro_batch_size: PositiveInteger
    """Records per forward pass and rank."""
    packing: bool = True
    """Whether the records of a forward pass are concatenated in one row, each attending only to itself, instead of
    padded."""
    balance: bool = True
    """Whether a step's records are distributed so that its micro batches have similar numbers of tokens, instead of in
    the order drawn. It has no effect with ``shuffle: false``, and with ``loss_average: micro_batch`` the loss depends
    on which records share a micro batch."""
    max_tokens: PositiveInteger | None = None
    """Tokens per forward pass and rank; a larger micro batch runs in several passes, with the same loss. None runs one
    pass."""
    max_length: PositiveInteger = 2048
    """Tokens per record, including image tokens; longer records are truncated, but never within an image."""
    loss_average: LossAverage = "micro_batch"
    """``micro_batch`` averages over each micro batch and then over the micro batches, as LLaVAR does; ``token``
    averages over all tokens of a step."""
    precision: Precision = "auto"
    """Number format of the computation; ``auto`` is bf16 on a GPU with bfloat16 arithmetic, fp16 (with loss
    scaling) on an older one with float16 tensor cores (V100, T4), else fp32."""
    fp32_reduction: bool = False
    """Whether sharded gradients are summed over the ranks in float32 instead of the computation's format (FSDP2, ZeRO);
    their traffic doubles."""
    gradient_checkpointing: Recompute = False
    """Whether activations are recomputed in the backward pass to save memory; ``auto`` recomputes in as many layers as
    the batch and the free memory require."""
    save_every_steps: PositiveInteger | None = None
    """Optimizer steps between two checkpoints; None saves about every 30 minutes, by the measured duration of the
    steps."""
    keep_checkpoints: PositiveInteger = 1
    """Number of checkpoints to keep."""
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    """Checks during training."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Recipe(StrictFields):
    """A whole run."""

    model: ModelConfig
    """Where the model comes from and how its weights are stored."""
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    """The run's stages, in order; each starts from the result of the one before."""
    output_dir: PathText
    """Folder of the run's results."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of all random numbers; 32 bits wide, as NumPy requires."""
    process_timeout: PositiveInteger = 1800
    """Seconds for which the processes of a run wait for each other before they stop with an error."""
    report_to: tuple[Text, ...] = ()
    """Experiment trackers by their names in transformers: ``tensorboard``, ``wandb``, ``mlflow``, ..."""
