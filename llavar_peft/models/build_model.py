"""``build_model``: a model and its processor, from parts or from a checkpoint, with every tensor checked.

All sources are read into one table of named tensors, which is compared with the table that the configuration requires;
``from_pretrained`` then places, casts and quantizes the tensors.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as hf_logging

from llavar_peft.compat.dependency_internals import (
    attention_implementation,
    keep_quantization_scales,
    release_int8_inputs,
)
from llavar_peft.constants import MODEL_TYPE
from llavar_peft.errors import ConfigError, EnvironmentFaultError, MissingDependencyError
from llavar_peft.models.checkpoint_loading import read_checkpoint, read_parts
from llavar_peft.models.decoder_structure import check_linear
from llavar_peft.models.launch_environment import claim_device, half_precision, requested_sharding
from llavar_peft.models.layer_kernels import apply_kernels, check_kernels
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.model_parts import ModelParts, check_stored_values, check_vocabulary
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration, LlavarModel
from llavar_peft.models.packed_attention import torch_attention
from llavar_peft.models.pending_weights import PendingWeights
from llavar_peft.models.pretrained_files import load_pretrained, unreadable_settings
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.models.quantized_checkpoint import NOT_QUANTIZED, check_stored, compute_in, prepare_stored
from llavar_peft.recipe.schema import Attention, Dtype, Kernels, ModelConfig
from llavar_peft.types import Quantization
from llavar_peft.weights.io import tensor_names
from llavar_peft.weights.io.companion_files import PROCESSOR_FILE
from llavar_peft.weights.io.hub_folders import resolve_folder
from llavar_peft.weights.io.joined_rows import JoinedRows, whole
from llavar_peft.weights.io.projector_file import apply_projector
from llavar_peft.weights.io.tensor_blocks import check_tensors

logger = logging.getLogger(__name__)

_SMALL_MODEL = 500_000_000  # parameters
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_model(
    config: ModelConfig, *, device: str | torch.device | None = None, seed: int = 0
) -> tuple[LlavarForConditionalGeneration, LlavarProcessor]:
    """Build a LLaVAR.

    Args:
        config: The model's source: ``language_model`` and ``vision_tower``; or ``checkpoint`` in this package's layout
            or in the released one (then with ``vision_tower``); each optionally with a stage-1 ``projector``.
        device: None is the CPU or, for a quantized model, the GPU of this process if there is one.
        seed: Of a new projector's random weights.

    Returns:
        The model, in ``eval`` mode with nothing frozen, and its processor.

    Raises:
        ConfigError: The settings do not name exactly one model.
        WeightsError: A tensor is missing, unexpected or has the wrong shape.
        MissingDependencyError: flash-attention, bitsandbytes or liger-kernel is requested and not installed.
        EnvironmentFaultError: The kernels need a GPU, and there is none.
    """
    parts = _read_checked_parts(config, seed)
    dtype = resolve_dtype(config.dtype)
    attention = resolve_attention(config.attention, dtype, parts.config)
    quantize = parts.quantize or config.quantize
    if device is None:
        device = claim_device() if quantize else "cpu"
    quantization = quantization_arguments(quantize, dtype)
    tensors = parts.whole_tensors()
    if parts.quantize is not None:  # stated in the configuration, the tensors are taken as they are
        settings = quantization.pop("quantization_config")
        parts.config.quantization_config = settings.to_dict()
        tensors = prepare_stored(tensors, dtype, settings.bnb_4bit_quant_storage)
    with _no_progress_bar_for_small_models(parts.tensors):
        model, loading = LlavarForConditionalGeneration.from_pretrained(
            None,
            trust_remote_code=False,
            config=parts.config,
            state_dict=tensors,
            dtype=dtype,
            attn_implementation=attention,
            device_map={"": device},
            output_loading_info=True,
            **quantization,
        )
    # Its rules of conversion may rename tensors that have their final names already.
    not_loaded = sorted({*loading["missing_keys"], *loading["unexpected_keys"]})
    if not_loaded:
        version, example = transformers.__version__, not_loaded[0]
        what = f"transformers {version} does not load the tensors of this language model ({example})"
        raise EnvironmentFaultError.at(parts.source, what, "use another version of transformers, or language model")
    _restore_buffers(model)
    if quantize is not None:
        keep_quantization_scales(model)
        release_int8_inputs(model)
    if parts.quantize is not None:
        compute_in(model, dtype)
    return _finish(model, parts, config)


def _restore_buffers(model: LlavarForConditionalGeneration) -> None:
    """Compute the buffers of the language model that no file holds.

    ``from_pretrained`` leaves those without values that a decoder computes when it is made, as Falcon-H1's does.
    """
    with init_empty_weights(include_buffers=False):
        fresh = AutoModel.from_config(
            copy.deepcopy(model.config.text_config),  # the argument below is written into it
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=False,
        )
    stored_in_files, buffers = fresh.state_dict().keys(), dict(model.model.language_model.named_buffers())
    for name, fresh_buffer in fresh.named_buffers():
        if name not in stored_in_files and name in buffers:
            expected = fresh_buffer.to(buffers[name].dtype)
            if not torch.equal(buffers[name].cpu(), expected):
                buffers[name].copy_(expected)


def build_pending_model(
    config: ModelConfig, *, seed: int = 0
) -> tuple[LlavarForConditionalGeneration, LlavarProcessor]:
    """Build a LLaVAR whose large tensors are on the device ``meta``, for training with sharded weights.

    The model cannot be used before it is sharded. ``Trainer`` reads the values of each shard from the files.

    Args:
        config: As for ``build_model``, without ``quantize``.
        seed: Of a new projector's random weights.

    Returns:
        The model, in ``eval`` mode with nothing frozen, and its processor.

    Raises:
        ConfigError: The settings do not name exactly one model.
        WeightsError: A tensor is missing, unexpected or has the wrong shape.
        MissingDependencyError: flash-attention or liger-kernel is requested and not installed.
        EnvironmentFaultError: The kernels need a GPU, and there is none.
    """
    parts = _read_checked_parts(config, seed)
    dtype = resolve_dtype(config.dtype)
    attention = resolve_attention(config.attention, dtype, parts.config)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForImageTextToText.from_config(
            parts.config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    model.tie_weights()  # moved to meta, tied embeddings are two parameters
    pending = PendingWeights(dtype)
    for name, parameter in list(model.named_parameters()):
        pending.add(parameter, parts.tensors[name])
    for name, buffer in model.named_buffers():
        if name in parts.tensors:  # such as the correction of the routing to experts, which no gradient changes
            buffer.copy_(whole(parts.tensors[name]))
    for name in parts.tensors:
        if not name.startswith(tensor_names.TRAINED_WITH_PROJECTOR):
            continue
        # peft copies these modules, so that their values are read now.
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(whole(parts.tensors[name]).to(dtype, copy=True)))
    model.pending_weights = pending
    return _finish(model.eval(), parts, config)


def load_processor(model: str, *, vision_tower: str | None = None) -> LlavarProcessor:
    """Load the processor that ``build_model`` returns, without the weights.

    Args:
        model: Folder of a checkpoint, in this package's layout or the released one, or of an adapter.
        vision_tower: Folder of the tower, for the released layout.

    Raises:
        ConfigError: The folder holds no checkpoint.
    """
    register()
    folder = resolve_folder(model, "model")
    if (folder / PROCESSOR_FILE).is_file():
        return load_pretrained(LlavarProcessor, folder)
    return read_checkpoint(ModelConfig(checkpoint=str(folder), vision_tower=vision_tower)).processor()


def register() -> None:
    """Register configuration, models and processor with ``transformers``' Auto classes; repeated calls do nothing.

    ``build_model`` and ``load_processor`` call it. Call it yourself before ``AutoModel...from_pretrained``.
    """
    AutoConfig.register(MODEL_TYPE, LlavarConfig, exist_ok=True)
    AutoModel.register(LlavarConfig, LlavarModel, exist_ok=True)
    AutoModelForImageTextToText.register(LlavarConfig, LlavarForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(LlavarConfig, LlavarProcessor, exist_ok=True)


def expected_shapes(config: LlavarConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that a configuration requires, by name in the modules' order.

    No memory is allocated.

    Raises:
        ConfigError: No model can be made from the configuration.
    """
    try:
        with torch.device("meta"):
            skeleton = LlavarForConditionalGeneration(config)
    except Exception as error:  # damaged settings make the modules raise many types of exceptions
        raise unreadable_settings(Path(config.name_or_path or "config.json"), "LlavarConfig", error) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop(tensor_names.HEAD, None)
    return shapes


def resolve_dtype(dtype: str) -> torch.dtype:
    """Return a setting's dtype; ``auto`` is the 16-bit format that suits the GPU, without a GPU float32."""
    return half_precision() or torch.float32 if dtype == "auto" else _DTYPES[dtype]


def resolve_attention(attention: Attention, dtype: torch.dtype, config: LlavarConfig) -> str:
    """Return a setting's attention; ``auto`` is flash-attention if it is installed and usable, otherwise SDPA.

    A language model with soft-capped attention scores (Gemma 2) gets eager attention where there is no flash-attention,
    because SDPA does not cap them.

    Raises:
        MissingDependencyError: ``flash_attention_2`` is requested and not installed.
        ConfigError: ``flash_attention_2`` is requested for float32 weights, which it does not support.
    """
    from transformers.utils import is_flash_attn_2_available

    half = dtype in (torch.bfloat16, torch.float16)
    available = bool(is_flash_attn_2_available())
    if attention == "auto" and available and half and torch.cuda.is_available():
        return "flash_attention_2"
    if attention in ("auto", "sdpa"):
        return torch_attention(config.text_config)
    if attention == "flash_attention_2" and not available:
        raise MissingDependencyError.at(
            "model.attention", "flash_attention_2 is not installed", "pip install 'llavar-peft[cuda]', or use 'auto'"
        )
    if attention == "flash_attention_2" and not half:
        raise ConfigError.at(
            "model.attention",
            "flash_attention_2 does not support float32 weights",
            "set dtype to bfloat16, or use 'auto'",
        )
    return attention


def quantization_arguments(quantize: Quantization | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that quantize the language model's layers.

    Raises:
        MissingDependencyError: bitsandbytes is not installed.
    """
    if quantize is None:
        return {}
    if quantize not in get_args(Quantization):
        known = " or ".join(repr(name) for name in get_args(Quantization))
        raise ConfigError.at("model.quantize", f"unknown format (got {quantize!r}, expected {known})", "correct it")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError.at(
            "model.quantize", f"{quantize} needs bitsandbytes, which is not installed", "pip install bitsandbytes"
        )
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(NOT_QUANTIZED))}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # FSDP2 shards, and in mixed precision casts, every parameter that is not of the computation's dtype.
            bnb_4bit_quant_storage=dtype if requested_sharding() == "fsdp2" else torch.uint8,
            llm_int8_skip_modules=list(NOT_QUANTIZED),
        )
    }


def _read_checked_parts(config: ModelConfig, seed: int) -> ModelParts:
    """Read a model from disk, and check everything that can be checked before it is built."""
    register()
    _check_values(config)
    _check_sources(config)
    parts = read_checkpoint(config, seed=seed) if config.checkpoint is not None else read_parts(config, seed=seed)
    check_kernels(config.kernels, parts.config.text_config.model_type)
    if config.quantize is not None:
        check_linear(parts.config.text_config, config.quantize)
    if config.projector is not None:
        apply_projector(parts.tensors, config.projector)
    if parts.quantize is None:
        check_tensors(parts.tensors, expected_shapes(parts.config), where=parts.source)
    else:
        check_stored(parts, expected_shapes(parts.config))
    check_vocabulary(parts)
    tower = resolve_folder(config.vision_tower, "model.vision_tower") if config.vision_tower else None
    check_stored_values(parts.source, tower)
    return parts


def _finish(
    model: LlavarForConditionalGeneration, parts: ModelParts, config: ModelConfig
) -> tuple[LlavarForConditionalGeneration, LlavarProcessor]:
    """Apply the settings that need the built model, and return it with its processor."""
    apply_kernels(model, config.kernels)
    processor = parts.processor()
    model.generation_config.update(**processor.generation_ids)
    model.name_or_path = model.config.name_or_path = parts.source
    dtype, attention = str(model.dtype).removeprefix("torch."), attention_implementation(model.config)
    logger.info("%s: %s weights, %s attention", parts.source, dtype, attention)
    return model, processor


def _check_values(config: object) -> None:
    """Reject values that a recipe's validation would: Python does not check types."""
    if not isinstance(config, ModelConfig):
        example = f"ModelConfig(checkpoint={str(config)!r})" if isinstance(config, str | Path) else "ModelConfig(...)"
        raise ConfigError.at("model", f"expected a ModelConfig (got {type(config).__name__})", f"pass {example}")
    for name, choices in (("dtype", Dtype), ("attention", Attention), ("kernels", Kernels)):
        value = getattr(config, name)
        if value not in get_args(choices):
            known = ", ".join(map(repr, get_args(choices)))
            raise ConfigError.at(
                f"model.{name}", f"unknown value (got {value!r}, expected one of {known})", "correct it"
            )


def _check_sources(config: ModelConfig) -> None:
    """Reject settings that name no model, or two."""
    has_parts = config.language_model is not None and config.vision_tower is not None
    if config.checkpoint is None and not has_parts:
        raise ConfigError.at(
            "model",
            f"no model is given (got language_model={config.language_model!r}, vision_tower={config.vision_tower!r}, "
            f"expected both, or checkpoint)",
            "set language_model and vision_tower, or checkpoint",
        )
    if config.checkpoint is not None and config.language_model is not None:
        raise ConfigError.at("model", "both checkpoint and language_model are given", "remove one of them")


@contextmanager
def _no_progress_bar_for_small_models(tensors: Mapping[str, torch.Tensor | JoinedRows]) -> Iterator[None]:
    """Hide ``transformers``' progress bar for a model that loads within a moment."""
    small = sum(tensor.numel() for tensor in tensors.values()) < _SMALL_MODEL
    if not (small and hf_logging.is_progress_bar_enabled()):
        yield
        return
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.enable_progress_bar()
