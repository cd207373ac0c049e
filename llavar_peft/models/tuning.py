"""Apply a ``Stage.tune`` value to a model, so that only what the stage trains is trainable, and merge the result.

Source: LLaVAR, llava/train/train.py, ``train`` (``tune_mm_mlp_adapter`` in stage 1; all but the tower in stage 2).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llavar_peft.compat.dependency_internals import embed_used_rows_only
from llavar_peft.errors import ConfigError
from llavar_peft.models import pissa
from llavar_peft.models.decoder_structure import find_layers
from llavar_peft.models.linear_layers import (
    LLAMA_BLOCKS,
    Blocks,
    choose_targets,
    find_linear_layers,
    target_pattern,
)
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.pending_weights import PendingWeights, set_adapter_values, without_memory_on_cpu
from llavar_peft.models.tower_tuning import TOWER, computed_parameters, linear_tower_layers, tower_pattern
from llavar_peft.recipe.schema import Full, Lora, LoraVariant, Projector, Tune

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

# How to add a LoRA variant, in three files:
#   1. recipe/schema.py: its name in ``LoraVariant``;
#   2. here: the arguments of ``peft.LoraConfig`` that select it. A variant that changes the base as it is applied, as
#      PiSSA does (pissa.py), is also called in ``apply_tuning``;
#   3. weights/adapter/lora_updates.py: the update that a merge adds to the base, if it is not LoRA's scaled B A.
# A variant with tensors of new names also needs them in weights/adapter/adapter_parts.py.
_VARIANT_ARGUMENTS: dict[LoraVariant, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {},  # no argument: peft would take the components out of the base again when the adapter is loaded
}

TRAINED_ROWS = 2
"""Number of trained rows of the input embeddings: the last ones, ``<im_start>`` and ``<im_end>``."""

CROSS_ATTENTION = "cross_attention"
"""Name of the cross-attention in our model."""

_ROWS_SUFFIX = "embed_tokens.rows"
_EMBEDDING_SUFFIX = "embed_tokens.embedding.weight"
_HALF = (torch.float16, torch.bfloat16)


class EmbeddingWithTrainedRows(nn.Module):
    """An embedding of which only the last rows are trained, as a parameter of their own.

    The optimizer never updates the other rows, so that they stay bit-identical, also with weight decay and with
    batches of text only.

    Args:
        embedding: The frozen embedding, ``[V, D]``.
        pending: Where its values are, if it has none yet.
    """

    def __init__(self, embedding: nn.Embedding, pending: PendingWeights | None = None) -> None:
        super().__init__()
        self.embedding = embedding
        self.first = embedding.num_embeddings - TRAINED_ROWS
        weight = embedding.weight.detach()
        rows = pending.read(embedding.weight, self.first, len(weight)) if pending else weight[self.first :]
        self.rows = nn.Parameter(rows.float().clone())

    @property
    def weight(self) -> Tensor:
        """The frozen weight ``[V, D]``, whose last rows are out of date during training."""
        return self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings ``[B, T, D]`` of ids ``[B, T]``, in the frozen embedding's dtype."""
        frozen_BTD = self.embedding(input_ids)
        index_BT = (input_ids - self.first).clamp(min=0)
        trained_BTD = nn.functional.embedding(index_BT, self.rows).to(frozen_BTD.dtype)
        return torch.where((input_ids >= self.first)[..., None], trained_BTD, frozen_BTD)

    def merged(self) -> nn.Embedding:
        """Write the trained rows into the frozen embedding and return it."""
        with torch.no_grad():
            self.embedding.weight[self.first :] = self.rows.to(self.embedding.weight.dtype)
        return self.embedding


class _NotKept(nn.Module):
    """Replaces the base's cross-attention inside peft's wrapper, of which training needs only the trained copy.

    The base's, in half precision, would take 2.4 GiB of a 7B model's memory.
    """

    def __getattr__(self, name: str) -> Any:
        """Explain what is missing when the adapter is switched off."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"{name}: the base's cross-attention is not kept while an adapter is trained; to switch the adapter "
                "off, load it with load_adapter"
            ) from None


def apply_tuning(
    model: LlavarForConditionalGeneration, tune: Tune, *, new_rows: bool = False, checkpoint: Path | None = None
) -> Any:
    """Freeze what a stage does not train, and add the parameters that it trains.

    Trained tensors are converted to float32 if the base is in half precision, as the original's autocast training
    keeps them.

    Args:
        model: A model without adapters; changed in place.
        tune: The stage's value.
        new_rows: Whether the ``<im_start>``/``<im_end>`` rows have not been trained yet;
            ``Lora(train_image_rows=None)`` trains them in that case.
        checkpoint: The checkpoint that ``load_trained`` will load next; PiSSA reads its initial adapters from it.

    Returns:
        The model to train, which for ``Lora`` is a ``PeftModel`` around the given one.

    Raises:
        ConfigError: ``Full`` on a quantized base, or a ``Lora`` that needs rows or layers which the model has not.
    """
    model.requires_grad_(False)
    connectors: list[nn.Module] = [model.model.multi_modal_projector]
    if model.model.cross_attention is not None:
        connectors.append(model.model.cross_attention)
    if isinstance(tune, Projector):
        embedding = model.get_input_embeddings()
        if model.config.use_im_start_end and isinstance(embedding, nn.Embedding):
            model.set_input_embeddings(EmbeddingWithTrainedRows(embedding, model.pending_weights))
        _unfreeze(*connectors)
        return model
    if isinstance(tune, Full):
        if is_quantized(model):
            raise ConfigError.at(
                "tune",
                "a quantized base cannot be trained in full (got tune: full with model.quantize)",
                "use tune: lora, or remove quantize",
            )
        _unfreeze(model.model.language_model, model.lm_head, *connectors)
        if tune.train_tower:
            _unfreeze_tower(model)
        return model
    train_rows = tune.train_image_rows
    if train_rows is None:
        train_rows = new_rows and bool(model.config.use_im_start_end)
    peft_model = _add_lora(model, tune, train_rows)
    if tune.variant == "pissa":
        pissa.make_residual(peft_model, checkpoint)
    return peft_model


@contextmanager
def share_adapter_inputs(model: Any, *, autocast: bool) -> Iterator[None]:
    """Let adapters take the inputs of their layers as they are, under autocast.

    peft converts the input of each adapted layer to the float32 of the adapter, which autocast converts back, so that
    each layer keeps a copy of its own for the backward pass. The gradients are the same. DoRA computes the norm of the
    weights in the dtype of the input and keeps the conversion.

    Args:
        model: The model that ``apply_tuning`` returned.
        autocast: Whether the model is called under autocast inside the context; otherwise peft's conversion stays.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    adapters = model.peft_config.values() if isinstance(model, PeftModel) else ()
    active = autocast and not any(adapter.use_dora for adapter in adapters)
    # Not peft's own context manager: it fails on models with trained embedding rows (peft 0.21).
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)] if active else []
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True


def merge_tuning(trained: Any) -> LlavarForConditionalGeneration:
    """Merge the trained rows and adapters into the model.

    Args:
        trained: The model that ``apply_tuning`` returned.

    Returns:
        The model without adapters, all of it frozen.
    """
    from peft import PeftModel

    model = trained.merge_and_unload() if isinstance(trained, PeftModel) else trained
    embedding = model.get_input_embeddings()
    if isinstance(embedding, EmbeddingWithTrainedRows):
        model.set_input_embeddings(embedding.merged())
    model.requires_grad_(False)
    plain: LlavarForConditionalGeneration = model
    return plain


def merge_rows_in_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict under a plain model's names, with the trained rows written into the embeddings.

    Args:
        state: ``state_dict()`` of a model with or without ``EmbeddingWithTrainedRows``.
    """
    plain = dict(state)
    for name in [name for name in plain if name.endswith(_ROWS_SUFFIX)]:
        rows = plain.pop(name)
        embedding_name = name.removesuffix(_ROWS_SUFFIX) + _EMBEDDING_SUFFIX
        weight = plain.pop(embedding_name).clone()
        weight[-rows.shape[0] :] = rows.to(weight.dtype)
        plain[embedding_name.replace(".embedding.weight", ".weight")] = weight
    return plain


def is_quantized(model: nn.Module) -> bool:
    """Return whether the base's linear layers are stored in 4 or 8 bits."""
    return bool(getattr(model, "is_quantized", False))  # set by transformers on quantized models only


def trained_parameters(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of trained and of all parameters (4-bit ones are counted as they are stored)."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)


def trained_names(model: nn.Module) -> list[str]:
    """Return the names of the trained parameters, in the modules' order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def part_of(name: str) -> str:
    """Return the part of the model that a trained parameter belongs to; each part can have its own learning rate.

    Args:
        name: As ``trained_names`` returns it.

    Returns:
        ``"projector"`` (with the cross-attention), ``"tower"`` (itself or its adapters), ``"rows"`` (of
        ``<im_start>``/``<im_end>``), ``"adapters"`` or ``"language_model"``.
    """
    if TOWER in name:
        return "tower"
    if "multi_modal_projector" in name or CROSS_ATTENTION in name:
        return "projector"
    if name.endswith(_ROWS_SUFFIX) or "trainable_tokens_delta" in name:
        return "rows"
    return "adapters" if "lora_" in name else "language_model"


def lora_config(
    tune: Lora,
    blocks: Blocks = LLAMA_BLOCKS,
    tower: Iterable[str] = (),
    layers: str = "layers",
    *,
    cross_attention: bool = False,
) -> LoraConfig:
    """Return the ``peft`` configuration of a stage's value.

    Args:
        tune: The stage's value.
        blocks: The language model's linear layers.
        tower: Names of the vision tower's linear layers that get adapters of ``tune.tower_rank``.
        layers: Name of the list of layers in the decoder.
        cross_attention: Whether the model has cross-attention, which is trained in full.
    """
    from peft import LoraConfig

    trained_in_full: list[str] = []
    if tune.train_projector:
        trained_in_full.append("multi_modal_projector")
    if cross_attention:
        trained_in_full.append(CROSS_ATTENTION)
    targets = target_pattern(choose_targets(tune, blocks), layers)
    tower_settings: dict[str, Any] = {}
    if tune.tower_rank is not None and tower:
        ratio = tune.tower_rank / tune.rank
        # With this alpha the updates are scaled as those of the language model.
        tower_alpha = tune.alpha * (ratio**0.5 if tune.variant == "rslora" else ratio)
        tower_modules = rf"model\.{TOWER}\..*"
        targets = f"{targets}|{tower_pattern(tower)}"
        tower_settings = {
            "rank_pattern": {tower_modules: tune.tower_rank},
            "alpha_pattern": {tower_modules: tower_alpha},
        }
    return LoraConfig(
        r=tune.rank,
        lora_alpha=tune.alpha,
        lora_dropout=tune.dropout,
        target_modules=targets,
        modules_to_save=trained_in_full or None,
        lora_bias=tune.bias == "lora",
        bias="none",  # peft's "all" would train the tower's biases; its "lora_only" those of LLaMA, which has none
        **tower_settings,
        **_VARIANT_ARGUMENTS[tune.variant],
    )


def _add_lora(model: LlavarForConditionalGeneration, tune: Lora, train_rows: bool) -> PeftModel:
    """Wrap a model into a ``PeftModel`` with new adapters, in which only what the stage trains is trainable."""
    from peft import get_peft_model

    tower_layers: Iterable[str] = ()
    if tune.tower_rank is not None:
        tower_layers = linear_tower_layers(model.model.vision_tower, model.model.num_tower_layers())
        model.config.tuned_vision_tower = True
    has_cross_attention = model.model.cross_attention is not None
    decoder = model.model.language_model
    blocks, layer_list = find_linear_layers(decoder), find_layers(decoder)[0]
    config = lora_config(tune, blocks, tower_layers, layer_list, cross_attention=has_cross_attention)
    if train_rows:
        if not model.config.use_im_start_end:
            raise ConfigError.at(
                "tune.train_image_rows",
                "the model has no <im_start> and <im_end> rows to train (its use_im_start_end is false)",
                "remove it, or set it to false",
            )
        size = model.config.text_config.vocab_size
        config.trainable_token_indices = {"embed_tokens": list(range(size - TRAINED_ROWS, size))}
    if model.pending_weights is None:
        peft_model = get_peft_model(model, config)
    else:
        with without_memory_on_cpu(model):
            peft_model = get_peft_model(model, config)
        set_adapter_values(peft_model, model.pending_weights)
    embed_used_rows_only(peft_model)
    if has_cross_attention:
        peft_model.get_base_model().model.cross_attention.original_module = _NotKept()
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and parameter.dtype in _HALF:
            parameter.data = parameter.data.float()
        # peft trains a copy of the projector; the original must not count as trained.
        if "original_module" in name:
            parameter.requires_grad_(False)
    return peft_model


def _unfreeze_tower(model: LlavarForConditionalGeneration) -> None:
    """Train what the projected features depend on; the rest, which some towers call too, gets the same dtype."""
    tower = model.model.vision_tower
    computed = computed_parameters(tower, model.model.num_tower_layers())
    _unfreeze(tower)
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(name in computed)
    model.config.tuned_vision_tower = True


def _unfreeze(*modules: nn.Module) -> None:
    for parameter in chain.from_iterable(module.parameters() for module in modules):
        if parameter.dtype in _HALF:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
