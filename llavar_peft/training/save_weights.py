"""Save the weights that a stage trains, and load them again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llavar_peft.atomic_files import write_json
from llavar_peft.constants import PROJECTOR_SAFETENSORS, TUNED_TOWER
from llavar_peft.models import pissa
from llavar_peft.models.adapter_loading import fingerprint_base, fingerprint_tower
from llavar_peft.models.checkpoint_loading import read_checkpoint, read_parts
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.quantized_checkpoint import dtype_before
from llavar_peft.models.tuning import EmbeddingWithTrainedRows, is_quantized, merge_rows_in_state_dict
from llavar_peft.recipe.schema import Lora, ModelConfig, Projector, Tune
from llavar_peft.weights.adapter.adapter_files import (
    ADAPTER_WEIGHTS,
    BASE_FILE,
    QUANTIZED_FROM,
    load_adapter_weights,
    quiet_about_biases,
)
from llavar_peft.weights.delta.released_layout import read_model_config
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.projector_file import apply_projector, save_projector
from llavar_peft.weights.io.tensor_blocks import check_tensors, check_values, open_weights, write_checksums
from llavar_peft.weights.io.tensor_table import read_tensor_table
from llavar_peft.weights.io.weights_fingerprint import FINGERPRINT_FILE

if TYPE_CHECKING:
    from llavar_peft.models.processing_llavar import LlavarProcessor

_SHARD_SIZE = "5GB"


def save_trained(
    model: Any,
    processor: LlavarProcessor,
    folder: Path,
    *,
    state: Mapping[str, Tensor],
    tune: Tune,
    base: ModelConfig,
) -> None:
    """Save what a stage trains, loadable by ``from_pretrained``.

    Full and projector stages save the whole model; a projector stage also saves ``mm_projector.bin`` and
    ``mm_projector.safetensors``; a LoRA stage saves the adapter with everything it trained. A quantized base is not
    saved: there, a projector stage saves projector, configuration and processor.

    Args:
        model: The model, unwrapped.
        processor: Saved into the same folder.
        folder: An existing folder.
        state: The model's ``state_dict()``, gathered if the model is sharded; for adapters at least what is trained.
        tune: What the stage trains.
        base: The model that an adapter belongs to.
    """
    if isinstance(tune, Lora):
        _save_adapter(model, folder, base, state)
    elif is_quantized(model):
        model.config.save_pretrained(str(folder))
    else:
        plain = merge_rows_in_state_dict(state)
        if model.config.tie_word_embeddings:
            plain.pop(tensor_names.HEAD, None)  # gathered from shards, it is a copy of the embeddings
        model.save_pretrained(str(folder), state_dict=plain, max_shard_size=_SHARD_SIZE)
    if isinstance(tune, Projector):
        # In float32, whatever the dtype of the base, so that a resumed run starts from exactly these values.
        embeddings = tensor_names.find_embeddings(state)
        prefixes = (embeddings.removesuffix("weight"), *tensor_names.TRAINED_WITH_PROJECTOR)
        trained = {
            name: tensor.float() for prefix in prefixes for name, tensor in state.items() if name.startswith(prefix)
        }
        merged = merge_rows_in_state_dict(trained)
        save_projector(folder, {tensor_names.EMBEDDINGS: merged.pop(embeddings), **merged})
    processor.save_pretrained(str(folder))


def _save_adapter(model: Any, folder: Path, base: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Save an adapter with everything that is needed to load it: its base's settings, and the fingerprint of that."""
    for settings in model.peft_config.values():
        settings.base_model_name_or_path = base.checkpoint or base.language_model
    with quiet_about_biases():
        # Of the embeddings, only the trained rows are saved.
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=dict(state))
    if pissa.has_residual_base(model):
        pissa.save_for_original_base(model, folder)
    write_checksums(folder)
    model.get_base_model().config.save_pretrained(str(folder))
    # The dtype that "auto" resolved to: a merge has to quantize the same numbers again.
    embedding = model.get_input_embeddings()
    # Trained rows wrap the base's embedding; the wrapper's weight cannot be computed from shards.
    dtype = str(getattr(embedding, "original_module", embedding).weight.dtype).removeprefix("torch.")
    base_settings = {**dataclasses.asdict(base), "dtype": dtype}
    quantized_from = dtype_before(base)
    if quantized_from is not None:
        base_settings[QUANTIZED_FROM] = quantized_from
    write_json(folder / BASE_FILE, base_settings)
    tower = fingerprint_tower(base) if model.get_base_model().config.tuned_vision_tower else None
    fingerprints = {"base": fingerprint_base(base)}
    if tower is not None:
        fingerprints["tower"] = tower
    write_json(folder / FINGERPRINT_FILE, fingerprints)


def save_plain(model: Any, processor: LlavarProcessor, folder: Path) -> None:
    """Save a model without adapters that is not quantized, and its processor."""
    model.save_pretrained(str(folder), max_shard_size=_SHARD_SIZE)
    processor.save_pretrained(str(folder))


def save_result(config: ModelConfig, folder: Path) -> None:
    """Complete the result of a projector stage whose base is quantized in memory.

    Writes the unquantized tensors of the base's source, with the trained projector and rows applied.

    Args:
        config: The source of the base.
        folder: The folder with ``mm_projector.safetensors``, to which the model's weights are added.
    """
    from huggingface_hub import save_torch_state_dict

    parts = read_checkpoint(config) if config.checkpoint is not None else read_parts(config, seed=0)
    apply_projector(parts.tensors, folder)
    save_torch_state_dict(parts.whole_tensors(), str(folder), max_shard_size=_SHARD_SIZE)
    # The configuration of the unquantized source, not that of the model in memory.
    parts.config.save_pretrained(str(folder))


def load_trained(model: Any, folder: Path) -> None:
    """Load a checkpoint's weights into a model that ``apply_tuning`` returned for the same stage, in place.

    Raises:
        WeightsError: A tensor is missing, unexpected or has another shape.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel):
        tensors = dict(open_weights(folder / ADAPTER_WEIGHTS))
        load_adapter_weights(
            model,
            pissa.tensors_for_residual_base(model, tensors) if pissa.has_residual_base(model) else tensors,
            where=str(folder),
        )
    elif isinstance(model.get_input_embeddings(), EmbeddingWithTrainedRows) or is_quantized(model):
        load_projector(model, folder / PROJECTOR_SAFETENSORS)
    else:
        load_full(model, folder)


def load_full(model: LlavarForConditionalGeneration, folder: Path) -> None:
    """Load all tensors of a full checkpoint into a plain model, in place.

    Pending tensors are read later, from the checkpoint.
    """
    check_values(read_tensor_table(folder))
    stored = open_weights(folder)
    target = model.state_dict(keep_vars=True)
    if model.config.tie_word_embeddings:
        target.pop(tensor_names.HEAD)
    check_tensors(stored, {name: tuple(tensor.shape) for name, tensor in target.items()}, where=str(folder))
    if read_model_config(folder).get(TUNED_TOWER):
        model.config.tuned_vision_tower = True
    pending = model.pending_weights
    with torch.no_grad():
        for name, tensor in stored.items():
            _keep_float32(target[name], tensor)
            if pending is not None and target[name] in pending:
                pending.replace(target[name], tensor)
            else:
                target[name].copy_(tensor)


def _keep_float32(target: Tensor, stored: Tensor) -> None:
    """Make a tensor float32 if the stored one is: a run that was not interrupted keeps what it trained in float32."""
    if target.is_floating_point() and stored.dtype == torch.float32:
        target.data = target.data.float()


def load_projector(model: Any, path: Path) -> None:
    """Load a projector stage's result into a model with or without separately trained rows, in place."""
    check_values(read_tensor_table(path))
    stored = open_weights(path)
    embedding = model.get_input_embeddings()
    parameters = {
        tensor_names.to_released(name) or name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(tensor_names.TRAINED_WITH_PROJECTOR)
    }
    expected = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    expected[tensor_names.RELEASED_EMBEDDINGS] = tuple(embedding.weight.shape)
    check_tensors(stored, expected, where=str(path))
    rows = stored[tensor_names.RELEASED_EMBEDDINGS][-2:]
    with torch.no_grad():
        for name, parameter in parameters.items():
            _keep_float32(parameter, stored[name])
            parameter.copy_(stored[name])
        if isinstance(embedding, EmbeddingWithTrainedRows):
            embedding.rows.copy_(rows)
        elif model.config.use_im_start_end:
            embedding.weight[-2:] = rows.to(embedding.weight.dtype)
