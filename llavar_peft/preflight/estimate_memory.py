"""The memory of one GPU at its peak, by part."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from llavar_peft.constants import LINEAR_LAYERS
from llavar_peft.models.build_model import expected_shapes
from llavar_peft.models.chunked_loss import CHUNK
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.tuning import TRAINED_ROWS, target_layers
from llavar_peft.preflight.estimate_layer import layer_cost
from llavar_peft.recipe.schema import Dtype, Full, Lora, ModelConfig, Precision, Projector, Quantization, Stage, Tune

_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per weight: 4 bits, one byte of scale per 64 weights, and one float32 scale per 256 of those scales."""
_STATES = {"adamw": 8.0, "adamw_8bit": 2.0 + 8 / 256, "paged_adamw_8bit": 2.0 + 8 / 256}
"""Bytes per trained weight: two moments, in float32 or in 8 bits with a float32 scale per 256."""
_LAYERS = "model.language_model.layers."


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        weights: All weights, in their storage format.
        gradients: Gradients of the trained weights, in float32.
        optimizer: The optimizer's moments.
        activations: Tensors kept for the backward pass, and temporary ones of the layer in progress.
        logits: Logits of a chunk of positions, and the gradient of ``lm_head``.
        other: Weights gathered or gradients copied for communication, or the optimizer's temporary memory if larger.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    other: int

    @property
    def peak(self) -> int:
        """The sum of all parts, without about 1 GiB that CUDA itself uses and PyTorch does not count."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.other


@dataclass(frozen=True, slots=True)
class Counts:
    """Numbers of parameters.

    Attributes:
        linear: The language model's linear layers, which can be quantized.
        norms: All other parameters of the language model's layers.
        head: Input embeddings and ``lm_head``.
        tower: The vision tower.
        projector: The projector.
        adapters: The adapters that the stage adds.
    """

    linear: int
    norms: int
    head: int
    tower: int
    projector: int
    adapters: int

    @property
    def whole(self) -> int:
        """All parameters except adapters."""
        return self.linear + self.norms + self.head + self.tower + self.projector


def count_parameters(config: LlavarConfig, tune: Tune) -> Counts:
    """Count a model's parameters."""
    sums = dict.fromkeys(("linear", "norms", "head", "tower", "projector", "adapters"), 0)
    targets = target_layers(tune) if isinstance(tune, Lora) else ()
    for name, shape in expected_shapes(config).items():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if name.startswith(_LAYERS):
            sums["linear" if kind in LINEAR_LAYERS else "norms"] += math.prod(shape)
            if isinstance(tune, Lora) and kind in targets:
                extra = shape[0] * ((tune.variant == "dora") + (tune.bias == "lora"))
                sums["adapters"] += tune.rank * sum(shape) + extra
        elif "vision_tower" in name:
            sums["tower"] += math.prod(shape)
        elif "multi_modal_projector" in name:
            sums["projector"] += math.prod(shape)
        else:
            sums["head"] += math.prod(shape)
    return Counts(**sums)


def count_trained(config: LlavarConfig, tune: Tune, counts: Counts) -> int:
    """Return the number of parameters that a stage trains."""
    rows: int = TRAINED_ROWS * config.text_config.hidden_size * bool(config.use_im_start_end)
    if isinstance(tune, Full):
        return counts.whole - counts.tower
    if isinstance(tune, Projector):
        return counts.projector + rows
    with_rows = rows if tune.train_image_rows else 0
    return counts.adapters + counts.projector * tune.train_projector + with_rows


def estimate_memory(
    config: LlavarConfig, model: ModelConfig, stage: Stage, *, tokens: int, supervised: int, gpus: int, sharded: bool
) -> Memory:
    """Estimate the memory of one GPU at its peak.

    Args:
        config: The model's configuration.
        model: How its weights are stored.
        stage: What is trained.
        tokens: Tokens of the largest forward pass on a GPU.
        supervised: Number of these tokens that have a label.
        gpus: Number of GPUs.
        sharded: Whether weights, gradients and optimizer states are sharded over them, layer by layer.
    """
    counts = count_parameters(config, stage.tune)
    trained = count_trained(config, stage.tune, counts)
    weights, compute = storage_dtype(model.dtype), compute_dtype(stage.precision)
    shards = gpus if sharded else 1
    gradients = 4 * trained / shards
    states = _STATES[stage.optim.optimizer] * trained / shards
    activations = _activations(config, stage, weights, compute, tokens, sharded=sharded)
    logits = _logits(config, stage.tune, compute, supervised)
    other = _gathered(config, counts, stage.tune, compute) if sharded else (gradients if gpus > 1 else 0.0)
    # The optimizer's temporary memory, a number per trained weight, is needed after activations and logits are freed.
    other = max(other, 4 * trained / shards - activations - logits)
    return Memory(
        weights=round(_stored(counts, stage.tune, weights, model.quantize) / shards),
        gradients=round(gradients),
        optimizer=round(states),
        activations=round(activations),
        logits=round(logits),
        other=round(other),
    )


def storage_dtype(dtype: Dtype) -> torch.dtype:
    """Return the dtype of the weights on a GPU that supports bfloat16."""
    return {"float32": torch.float32, "float16": torch.float16}.get(dtype, torch.bfloat16)


def compute_dtype(precision: Precision) -> torch.dtype | None:
    """Return the autocast dtype on a GPU that supports bfloat16; None computes in the weights' dtype."""
    return {"fp32": None, "fp16": torch.float16}.get(precision, torch.bfloat16)


def _stored(counts: Counts, tune: Tune, weights: torch.dtype, quantize: Quantization | None) -> float:
    each = weights.itemsize
    if isinstance(tune, Full):
        return 4.0 * (counts.whole - counts.tower) + each * counts.tower
    linear = {"nf4": _NF4, "int8": 1.0 + 4 / 4096}.get(quantize or "", float(each))
    frozen = counts.linear * linear + (counts.norms + counts.head + counts.tower) * each
    if isinstance(tune, Projector):
        return frozen + 4.0 * counts.projector
    # peft trains a copy of the projector and keeps the original.
    return frozen + counts.projector * (each + 4.0 * tune.train_projector) + 4.0 * counts.adapters


def _activations(
    config: LlavarConfig,
    stage: Stage,
    weights: torch.dtype,
    compute: torch.dtype | None,
    tokens: int,
    *,
    sharded: bool,
) -> float:
    cost = layer_cost(config, stage.tune, weights=weights, autocast=None if compute == weights else compute)
    if sharded:
        cost = dataclasses.replace(cost, constant=0)  # sharded weights are gathered in half precision already
    layers: int = config.text_config.num_hidden_layers
    if stage.gradient_checkpointing is False:
        return layers * cost.kept(tokens) + cost.per_token * tokens
    return layers * cost.input_per_token * tokens + 2 * cost.kept(tokens)


def _logits(config: LlavarConfig, tune: Tune, compute: torch.dtype | None, supervised: int) -> float:
    words: int = config.text_config.vocab_size
    width: int = config.text_config.hidden_size
    half = compute is not None
    # In float32, and twice: the softmax subtracts their maximum.
    chunk = min(CHUNK, supervised) * words * 8
    if not isinstance(tune, Full):
        return float(chunk)
    # The gradient of lm_head, summed in float32 before it is added to the parameter's, and its half precision copy.
    return float(chunk + words * width * (4 + 2 * half))


def _gathered(config: LlavarConfig, counts: Counts, tune: Tune, compute: torch.dtype | None) -> float:
    each = 4 if compute is None else compute.itemsize
    layer = (counts.linear + counts.norms + counts.adapters) / config.text_config.num_hidden_layers
    root = counts.head + counts.tower + counts.projector
    gradients = layer + counts.head + counts.projector if isinstance(tune, Full) else counts.projector
    gathered: float = each * (root + 2 * layer) + 4.0 * gradients
    return gathered
