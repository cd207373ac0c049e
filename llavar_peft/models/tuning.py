"""What trains: a ``Stage.tune`` value applied to a model, and taken off again.

Source: LLaVAR, llava/train/train.py, ``train`` (``tune_mm_mlp_adapter`` in stage 1; all but the tower in stage 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llavar_peft.constants import ATTENTION_LAYERS, LINEAR_LAYERS, MLP_LAYERS
from llavar_peft.errors import ConfigError
from llavar_peft.models import pissa
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.recipe.schema import Full, Lora, Projector, Tune

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

TRAINED_ROWS = 2
"""``<im_start>`` and ``<im_end>``: the last rows of the input embeddings."""

_TARGETS = {"all-linear": LINEAR_LAYERS, "attention": ATTENTION_LAYERS, "mlp": MLP_LAYERS}
_ROWS_SUFFIX = "embed_tokens.rows"
_WRAPPED_SUFFIX = "embed_tokens.embedding.weight"


class EmbeddingWithTrainedRows(nn.Module):
    """An embedding of which only the last rows are a parameter.

    Adam never sees the other rows, so that they stay as they are to the last bit, text-only records or not.

    Args:
        embedding: The frozen whole, ``[V, D]``.
        rows: How many of its last rows are trained, in float32.
    """

    def __init__(self, embedding: nn.Embedding, rows: int = TRAINED_ROWS) -> None:
        super().__init__()
        self.embedding = embedding
        self.first = embedding.num_embeddings - rows
        self.rows = nn.Parameter(embedding.weight.detach()[self.first :].float().clone())

    @property
    def weight(self) -> Tensor:
        """The frozen whole, whose last rows are out of date while training."""
        return self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look ids up.

        Args:
            input_ids: ``[B, T]``.

        Returns:
            ``[B, T, D]`` in the embedding's dtype.
        """
        frozen_BTD = self.embedding(input_ids)
        index_BT = (input_ids - self.first).clamp(min=0)
        trained_BTD = nn.functional.embedding(index_BT, self.rows).to(frozen_BTD.dtype)
        return torch.where((input_ids >= self.first)[..., None], trained_BTD, frozen_BTD)

    def folded(self) -> nn.Embedding:
        """The plain embedding again, with the trained rows in their place."""
        with torch.no_grad():
            self.embedding.weight[self.first :] = self.rows.to(self.embedding.weight.dtype)
        return self.embedding


def apply_tuning(
    model: LlavarForConditionalGeneration, tune: Tune, *, new_rows: bool = False, checkpoint: Path | None = None
) -> Any:
    """Freeze what a stage does not train and adds what it trains.

    Trained tensors are brought to float32 where the base is kept in half precision, as the original's autocast training
    keeps them.

    Args:
        model: A plain model; it is changed in place.
        tune: The stage's value.
        new_rows: Whether nothing has trained the ``<im_start>``/``<im_end>`` rows yet, so that
            ``Lora(train_image_rows=None)`` does.
        checkpoint: The one that ``load_trained`` will take up next: PiSSA starts where it started.

    Returns:
        What to train: the model, or a ``PeftModel`` around it.

    Raises:
        ConfigError: ``Full`` on a quantized base, or a ``Lora`` that asks for what the model does not have.
    """
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector
    if isinstance(tune, Projector):
        _train_rows(model)
        _unfreeze(projector)
        return model
    if isinstance(tune, Full):
        if is_quantized(model):
            raise ConfigError.at(
                "tune", "full finetuning of a quantized base is impossible", "use tune: lora, or leave quantize out"
            )
        _unfreeze(model.model.language_model)
        _unfreeze(model.lm_head)
        _unfreeze(projector)
        return model
    wrapped = _with_lora(model, tune, new_rows if tune.train_image_rows is None else tune.train_image_rows)
    if tune.variant == "pissa":
        pissa.make_residual(wrapped, checkpoint)
    return wrapped


def merge_tuning(trained: Any) -> LlavarForConditionalGeneration:
    """Make a plain model again of what a stage trained: rows folded in, adapters merged.

    Args:
        trained: What ``apply_tuning`` returned.

    Returns:
        The plain model, nothing of it trainable.
    """
    from peft import PeftModel

    model = trained.merge_and_unload() if isinstance(trained, PeftModel) else trained
    embedding = model.get_input_embeddings()
    if isinstance(embedding, EmbeddingWithTrainedRows):
        model.set_input_embeddings(embedding.folded())
    model.requires_grad_(False)
    plain: LlavarForConditionalGeneration = model
    return plain


def folded_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a model in stage 1 under a plain model's names.

    Args:
        state: ``state_dict()`` of a model whose rows are trained apart, or of any other.

    Returns:
        The same tensors; the trained rows stand in the embeddings.
    """
    plain = dict(state)
    rows = [name for name in plain if name.endswith(_ROWS_SUFFIX)]
    for name in rows:
        trained = plain.pop(name)
        wrapped = name.removesuffix(_ROWS_SUFFIX) + _WRAPPED_SUFFIX
        whole = plain.pop(wrapped).clone()
        whole[-trained.shape[0] :] = trained.to(whole.dtype)
        plain[wrapped.replace(".embedding.weight", ".weight")] = whole
    return plain


def is_quantized(model: nn.Module) -> bool:
    """Whether the base's linear layers are stored in 4 or 8 bits."""
    return bool(getattr(model, "is_quantized", False))


def trained_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters a stage trains, and how many the model has (4-bit ones counted as they are stored)."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(count for count, trained in counts if trained), sum(count for count, _ in counts)


def trained_names(model: nn.Module) -> list[str]:
    """Name of the parameters that a stage trains, in the modules' order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _unfreeze(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def _train_rows(model: LlavarForConditionalGeneration) -> None:
    embedding = model.get_input_embeddings()
    if model.config.use_im_start_end and isinstance(embedding, nn.Embedding):
        model.set_input_embeddings(EmbeddingWithTrainedRows(embedding))


def target_layers(tune: Lora) -> tuple[str, ...]:
    """Name of the language model's layers that get adapters.

    Args:
        tune: The stage's value.

    Returns:
        The names, without where they stand.
    """
    return tuple(_TARGETS[tune.target] if isinstance(tune.target, str) else tune.target)


def lora_config(tune: Lora) -> LoraConfig:
    """The ``peft`` configuration of a stage's value.

    ``target_modules`` is anchored at the language model: a plain ``q_proj`` would hit the tower too. ``pissa`` has no
    setting here: what it does to the base must not happen again wherever the adapter is opened.
    """
    from peft import LoraConfig

    names = target_layers(tune)
    attention = [name for name in names if name in ATTENTION_LAYERS]
    mlp = [name for name in names if name in MLP_LAYERS]
    blocks = [rf"{block}\.({'|'.join(layers)})" for block, layers in (("self_attn", attention), ("mlp", mlp)) if layers]
    return LoraConfig(
        r=tune.rank,
        lora_alpha=tune.alpha,
        lora_dropout=tune.dropout,
        target_modules=rf"model\.language_model\.layers\.\d+\.({'|'.join(blocks)})",
        modules_to_save=["multi_modal_projector"] if tune.train_projector else None,
        use_rslora=tune.variant == "rslora",
        use_dora=tune.variant == "dora",
        lora_bias=tune.bias == "lora",
        bias="none",  # peft's "all" would train the tower's biases; its "lora_only" those of LLaMA, which has none
    )


def _with_lora(model: LlavarForConditionalGeneration, tune: Lora, rows: bool) -> PeftModel:
    from peft import get_peft_model

    config = lora_config(tune)
    if rows:
        if not model.config.use_im_start_end:
            raise ConfigError.at(
                "tune.train_image_rows", "the model has no <im_start>/<im_end> rows", "leave it out, or set it to false"
            )
        size = model.config.text_config.vocab_size
        config.trainable_token_indices = {"embed_tokens": list(range(size - TRAINED_ROWS, size))}
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
        # peft copies the projector to train it; what a run trains is seen by its name.
        if "original_module" in name:
            parameter.requires_grad_(False)
    return wrapped


def part_of(name: str) -> str:
    """Which part of the model a trained parameter belongs to: those that can have learning rates of their own.

    Args:
        name: As ``trained_names`` gives it.

    Returns:
        ``"projector"``, ``"rows"`` (of ``<im_start>``/``<im_end>``), ``"adapters"`` or ``"language_model"``.
    """
    if "multi_modal_projector" in name:
        return "projector"
    if name.endswith(_ROWS_SUFFIX) or "trainable_tokens_delta" in name:
        return "rows"
    return "adapters" if "lora_" in name else "language_model"
