"""The moments of a training step at which memory can be at its peak, and the bytes of each part at these moments.

tests/gpu_sim/test_estimate_peaks.py compares the result with the tensors of whole training steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from llavar_peft.models.chunked_loss import CHUNK
from llavar_peft.models.detail_features import CROPS_AT_ONCE
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.preflight.estimate_counts import Counts
from llavar_peft.preflight.estimate_image import ImageMemory, measure_images
from llavar_peft.preflight.estimate_layer import LayerDtypes, LayerMemory, computes_scores, measure_layer
from llavar_peft.preflight.estimate_tower import TowerMemory, measure_tower
from llavar_peft.preflight.estimate_views import detail_shape, image_cost
from llavar_peft.recipe.schema import Dtype, Full, Lora, ModelConfig, Precision, Projector, Stage

_SCALES = 1 / 64 + 4 / (64 * 256)
"""Bytes of nf4's scales per weight: one byte per 64 weights, and one float32 scale per 256 of those."""


def storage_dtype(dtype: Dtype) -> torch.dtype:
    """Return the dtype of the weights on a GPU that supports bfloat16."""
    return {"float32": torch.float32, "float16": torch.float16}.get(dtype, torch.bfloat16)


def compute_dtype(precision: Precision) -> torch.dtype | None:
    """Return the autocast dtype on a GPU that supports bfloat16; None computes in the weights' dtype."""
    return {"fp32": None, "fp16": torch.float16}.get(precision, torch.bfloat16)


@dataclass(frozen=True)
class StepMoments:
    """A training step on one GPU.

    Args:
        config: The model's configuration.
        model: How its weights are stored.
        stage: What is trained.
        counts: The model's parameters.
        trained: Number of trained parameters.
        tokens: Tokens of the largest forward pass on a GPU.
        supervised: Number of these tokens that have a label.
        gpus: Number of GPUs.
        sharded: Whether weights, gradients and optimizer states are sharded over them, layer by layer.
    """

    config: LlavarConfig
    model: ModelConfig
    stage: Stage
    counts: Counts
    trained: int
    tokens: int
    supervised: int
    gpus: int
    sharded: bool

    @property
    def shards(self) -> int:
        """Number of GPUs that share one copy of the model."""
        return self.gpus if self.sharded else 1

    @property
    def weights(self) -> float:
        """Bytes of the stored weights."""
        counts, each = self.counts, storage_dtype(self.model.dtype).itemsize
        if isinstance(self.stage.tune, Full):
            tower = 4.0 if self.stage.tune.train_tower else each
            frozen = each * counts.encoder
            return (4.0 * (counts.whole - counts.tower - counts.encoder) + tower * counts.tower + frozen) / self.shards
        quantize = self.model.quantize
        linear = {"nf4": 0.5, "int8": 1.0 + 4 / 4096}.get(quantize or "", float(each)) * counts.linear
        others = each * (counts.norms + counts.head + counts.tower + counts.encoder) + 4.0 * (
            counts.adapters + counts.tower_trained
        )
        if isinstance(self.stage.tune, Projector):
            projector = 4.0 * (counts.projector + counts.cross_attention)
        else:
            # peft trains a copy of the projector, and keeps the original.
            projector = counts.projector * (each + 4.0 * self.stage.tune.train_projector)
            projector += counts.cross_attention * 4.0
        # Scales are no parameters, and are not sharded.
        scales = _SCALES * counts.linear if quantize == "nf4" else 0.0
        return (linear + others + projector) / self.shards + scales

    def moments(self) -> tuple[dict[str, float], ...]:
        """Return the moments as bytes by part, without weights and optimizer states."""
        layer = self._layer
        layers: int = self.config.text_config.num_hidden_layers
        recomputes = self.stage.gradient_checkpointing is not False
        kept = layer.input if recomputes else layer.kept
        whole = 4.0 * self.trained / self.shards
        existing = whole if self._accumulates else 0.0
        during = self._gathered_root + self._gathered_layers + self._decompressed
        shared = layer.shared + self._images.kept + self._tower.kept
        tower = {
            "gradients": existing,
            "activations": float(layer.input + self._images.tower),
            "logits": 0.0,
            "other": self._gathered_root,
        }
        loss = {
            "gradients": existing,
            "activations": shared + layers * kept + self._norm,
            "logits": self._logits,
            "other": self._gathered_root + 2 * self._gathered_half_head,
        }
        last_layer = {
            "gradients": max(existing, self._trained_half_head),
            "activations": shared + (layers - 1 + recomputes) * kept + layer.backward,
            "logits": 0.0,
            "other": during,
        }
        first_layer = {
            # The layer's own gradients are among what was measured.
            "gradients": max(existing, whole - self._trained_layer - self._trained_half_head - self._trained_tower),
            "activations": float(shared + recomputes * kept + layer.backward),
            "logits": 0.0,
            "other": during + self._gathered_half_head,
        }
        optimizer = {"gradients": whole, "activations": 0.0, "logits": 0.0, "other": self._optimizer_scratch}
        in_trained_tower = {
            # As above, and those of other parts are complete.
            "gradients": max(existing, whole - self._trained_tower),
            "activations": float(self._tower.backward),
            "logits": 0.0,
            "other": self._gathered_root + 2.0 * self._compute * self.counts.tower_trained * self.sharded,
        }
        return tower, loss, last_layer, first_layer, self._embedding(whole), in_trained_tower, optimizer

    @cached_property
    def _layer(self) -> LayerMemory:
        text = self.config.text_config
        eager = computes_scores(text, self.model.attention)
        rows = self.stage.micro_batch_size if eager else 1
        return measure_layer(
            text, self.stage.tune, self._dtypes, rows=(rows, math.ceil(self.tokens / rows)), eager=eager,
            accumulated=self._accumulates, details=detail_shape(self.config), images=self._projected_views,
        )  # fmt: skip

    @property
    def _views(self) -> int:
        """Number of images that the tower gets in a pass."""
        cost = image_cost(self.config, self.stage.max_length)
        return round((self.tokens - self.supervised) * cost.views / cost.tokens)

    @property
    def _projected_views(self) -> int:
        """Number of images that the tower gets in the call whose output is projected; crops have calls of their own."""
        details = detail_shape(self.config)
        return self._views if details is None else round(self._views / (1 + details.crops))

    @cached_property
    def _images(self) -> ImageMemory:
        tune = self.stage.tune
        trained = not isinstance(tune, Lora) or tune.train_projector
        most = max(self._projected_views, min(self._views - self._projected_views, CROPS_AT_ONCE))
        return measure_images(self.config, self._dtypes, images=most, trained=trained)

    @cached_property
    def _tower(self) -> TowerMemory:
        return measure_tower(
            self.config,
            self.stage.tune,
            self._dtypes,
            images=max(1, self._projected_views),
            recomputes=self.stage.gradient_checkpointing is not False,
            accumulated=self._accumulates,
        )

    @property
    def _trained_tower(self) -> float:
        return 4.0 * self.counts.tower_trained / self.shards

    @property
    def _dtypes(self) -> LayerDtypes:
        weights, compute = storage_dtype(self.model.dtype), compute_dtype(self.stage.precision)
        if self.sharded and compute is not None:
            return LayerDtypes(compute, compute, compute, autocast=None)  # gathered in half precision
        # Trained embeddings are float32, and so is then the hidden state between the layers.
        stream = torch.float32 if isinstance(self.stage.tune, Full) else weights
        return LayerDtypes(weights, torch.float32, stream, autocast=compute)

    @property
    def _accumulates(self) -> bool:
        """Whether a step has several passes, so that gradients exist while most of them run."""
        stage = self.stage
        several = stage.max_tokens is not None and stage.packing and stage.micro_batch_size > 1
        return several or stage.global_batch_size > stage.micro_batch_size * self.gpus

    @property
    def _compute(self) -> int:
        """Bytes of a number in the computation."""
        return (compute_dtype(self.stage.precision) or storage_dtype(self.model.dtype)).itemsize

    @property
    def _half_head(self) -> int:
        """Number of weights of ``lm_head``, which has as many as the input embeddings and may share them."""
        text = self.config.text_config
        return int(text.vocab_size * text.hidden_size)

    @property
    def _trained_half_head(self) -> float:
        return 4.0 * self._half_head / self.shards if isinstance(self.stage.tune, Full) else 0.0

    @property
    def _trained_layer(self) -> float:
        counts = self.counts
        trained = counts.adapters + (counts.linear + counts.norms) * isinstance(self.stage.tune, Full)
        trained += counts.cross_attention
        layers: int = self.config.text_config.num_hidden_layers
        return 4.0 * trained / layers / self.shards

    @property
    def _norm(self) -> float:
        """The final norm's input, in float32 as well, and its output."""
        width: int = self.config.text_config.hidden_size
        return float(self.tokens * width * (4 + 2 * self._dtypes.stream.itemsize))

    @property
    def _logits(self) -> float:
        """A chunk of logits in float32, twice, because the softmax subtracts their maximum, and the gradients.

        Where logits are capped, a third copy exists.
        """
        text = self.config.text_config
        hidden = 2 * self.supervised * text.hidden_size * self._compute
        each = 8 if getattr(text, "final_logit_softcapping", None) is None else 12
        logits = float(each * min(CHUNK, self.supervised) * text.vocab_size + hidden)
        if isinstance(self.stage.tune, Full):
            # lm_head's gradient, summed in float32; that of a chunk; and under autocast the weight in half precision.
            cast = self._compute if self._dtypes.autocast is not None else 0
            logits += self._half_head * (4 + self._compute + cast)
        return logits

    def _embedding(self, whole: float) -> dict[str, float]:
        """Return the moment at which the gradient of trained input embeddings is made, after all others."""
        full, hidden = isinstance(self.stage.tune, Full), 2 * self._layer.input
        # Where lm_head is the same weight, autograd adds its gradient to a third tensor.
        temporary = 4.0 * self._half_head * (self._accumulates + 2 * bool(self.config.tie_word_embeddings))
        if self.sharded:
            temporary = 3.0 * self._gathered_half_head  # the weight, its gradient and a copy to exchange
        other = self._gathered_root + temporary * full
        # The tower's gradients are made later.
        gradients = max(whole * self._accumulates, whole - self._trained_tower)
        return {"gradients": gradients, "activations": float(hidden + self._tower.kept), "logits": 0.0, "other": other}

    @property
    def _gathered_root(self) -> float:
        """Parts outside the layers, which FSDP keeps gathered from the forward to the backward pass."""
        return float(self._compute * (self.counts.tower + self.counts.encoder + self.counts.projector) * self.sharded)

    @property
    def _gathered_half_head(self) -> float:
        return float(self._compute * self._half_head * self.sharded)

    @property
    def _gathered_layers(self) -> float:
        """The layer in progress, the next one, and the gradients of the one before, on their way to other GPUs.

        A layer's cross-attention is gathered apart from it, and only once: when the gradients of the next layer's are
        made, those of this one are complete, and have been sent in its place.
        """
        if not self.sharded:
            return 0.0
        counts, layers = self.counts, self.config.text_config.num_hidden_layers
        stored = 0.5 if self.model.quantize == "nf4" else float(self._compute)
        crossed = float(counts.cross_attention * self._compute)
        gathered = counts.linear * stored + (counts.norms + counts.adapters) * self._compute
        trained = float(self._trained_layer * self.shards / 4 * self._compute * layers)
        exchanged: float = max(trained - crossed, crossed)
        found: float = (2 * gathered + crossed + exchanged) / layers
        return found

    @property
    def _decompressed(self) -> float:
        """The largest quantized weight in half precision, with its scales in float32."""
        largest = max(height * width for height, width in self.counts.matrices.values())
        return largest * (2 + 4 / 64) if self.model.quantize else 0.0

    @property
    def _optimizer_scratch(self) -> float:
        """Memory of AdamW where it is not fused, with fp16: a number per trained weight."""
        unfused = self.stage.optim.optimizer == "adamw" and self.stage.precision == "fp16"
        return 4.0 * self.trained / self.shards * unfused
