"""``build_model``: one model and its processor, from parts or from a checkpoint, strictly.

Every way leads through one table of named tensors, held against the table that the configuration asks for; the
library's own ``from_pretrained`` then places, casts and quantizes them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from llavar_peft.errors import ConfigError, MissingDependencyError
from llavar_peft.models.auto_classes import register
from llavar_peft.models.checkpoint_loading import read_checkpoint, read_parts, resolve_folder
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.model_parts import Parts
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.recipe.schema import Attention, ModelConfig, Quantization
from llavar_peft.weights.io.projector_file import apply_projector
from llavar_peft.weights.io.tensor_blocks import check_tensors

logger = logging.getLogger(__name__)

PROCESSOR_FILE = "processor_config.json"
_SMALL = 500_000_000  # parameters
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What is never quantized. "vision_tower" alone would not match the tower's modules.
_UNQUANTIZED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


def build_model(
    config: ModelConfig, *, device: str | torch.device | None = None, seed: int = 0
) -> tuple[LlavarForConditionalGeneration, LlavarProcessor]:
    """Build a LLaVAR.

    Args:
        config: Where the model comes from: ``language_model`` and ``vision_tower``; or ``checkpoint``, ours or in the
            released layout (then with ``vision_tower``); each optionally with a stage-1 ``projector``.
        device: Where the weights go. None: the CPU, or, quantized, the current GPU where there is one.
        seed: Draws a new projector's weights, where none are given.

    Returns:
        The model, in ``eval`` mode with nothing frozen, and its processor.

    Raises:
        ConfigError: The settings do not name one model.
        WeightsError: A tensor is missing, extra or misshapen.
        MissingDependencyError: flash-attention or bitsandbytes is asked for and cannot be had.
    """
    register()
    _check_sources(config)
    parts = read_checkpoint(config) if config.checkpoint is not None else read_parts(config, seed=seed)
    if config.projector is not None:
        apply_projector(parts.tensors, config.projector)
    check_tensors(parts.tensors, expected_shapes(parts.config), where=parts.source)
    dtype = resolve_dtype(config.dtype)
    attention = resolve_attention(config.attention, dtype)
    if device is None:
        device = "cuda" if config.quantize and torch.cuda.is_available() else "cpu"
    with _bar_for_large_models_only(parts.tensors):
        model = LlavarForConditionalGeneration.from_pretrained(
            None,
            config=parts.config,
            state_dict=parts.tensors,
            dtype=dtype,
            attn_implementation=attention,
            device_map={"": device},
            **_quantization(config.quantize, dtype),
        )
    if config.quantize is not None:
        _keep_scales(model)
    _set_generation(model, parts.tokenizer)
    model.name_or_path = model.config._name_or_path = parts.source
    processor = processor_of(parts)
    logger.info("%s: %s weights, attention by %s", parts.source, str(dtype).removeprefix("torch."), attention)
    return model, processor


def load_processor(model: str, *, vision_tower: str | None = None) -> LlavarProcessor:
    """Open a checkpoint's processor alone, without its weights.

    Args:
        model: A checkpoint's folder, ours or in the released layout; or an adapter's.
        vision_tower: Where the tower is, for the released layout.

    Returns:
        The processor that ``build_model`` would give.

    Raises:
        ConfigError: The folder holds no checkpoint.
    """
    register()
    folder = resolve_folder(model, "model")
    if (folder / PROCESSOR_FILE).is_file():
        opened: LlavarProcessor = LlavarProcessor.from_pretrained(folder)
        return opened
    return processor_of(read_checkpoint(ModelConfig(checkpoint=str(folder), vision_tower=vision_tower)))


def processor_of(parts: Parts) -> LlavarProcessor:
    """The processor of a model read from disk."""
    return LlavarProcessor(
        image_processor=parts.image_processor,
        tokenizer=parts.tokenizer,
        image_mode=parts.image_mode,
        inference_image_mode=parts.inference_image_mode,
        patch_size=parts.config.vision_config.patch_size,
        use_im_start_end=parts.config.use_im_start_end,
        sep_image_conv_front=parts.config.sep_image_conv_front,
    )


@contextmanager
def _bar_for_large_models_only(tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """The library draws a progress bar for a model of any size; for one that loads in a moment it is noise."""
    small = sum(tensor.numel() for tensor in tensors.values()) < _SMALL
    if not (small and hf_logging.is_progress_bar_enabled()):
        yield
        return
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.enable_progress_bar()


def expected_shapes(config: LlavarConfig) -> dict[str, tuple[int, ...]]:
    """The table of tensors that a configuration asks for.

    Args:
        config: The model's.

    Returns:
        Shape by name, in the modules' order. Nothing is allocated.
    """
    with torch.device("meta"):
        skeleton = LlavarForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}


def resolve_dtype(dtype: str) -> torch.dtype:
    """What ``auto`` means here: bfloat16 on a GPU that has it, else float32."""
    if dtype == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bf16 else torch.float32
    return _DTYPES[dtype]


def resolve_attention(attention: Attention, dtype: torch.dtype) -> str:
    """What ``auto`` means here: flash-attention where it is installed and possible, else SDPA.

    Raises:
        MissingDependencyError: ``flash_attention_2`` is asked for and is not installed.
        ConfigError: It is asked for with float32 weights, which it cannot take.
    """
    from transformers.utils import is_flash_attn_2_available

    half = dtype in (torch.bfloat16, torch.float16)
    available = bool(is_flash_attn_2_available())
    if attention == "auto":
        return "flash_attention_2" if available and half and torch.cuda.is_available() else "sdpa"
    if attention == "flash_attention_2" and not available:
        raise MissingDependencyError.at(
            "model.attention", "flash_attention_2 is not installed", "pip install 'llavar_peft[cuda]', or use 'auto'"
        )
    if attention == "flash_attention_2" and not half:
        raise ConfigError.at(
            "model.attention", "flash_attention_2 cannot take float32 weights", "set dtype to bfloat16, or use 'auto'"
        )
    return attention


def _check_sources(config: ModelConfig) -> None:
    has_parts = config.language_model is not None and config.vision_tower is not None
    if config.checkpoint is None and not has_parts:
        raise ConfigError.at(
            "model",
            f"no model is named (got language_model={config.language_model!r}, vision_tower={config.vision_tower!r})",
            "give language_model and vision_tower, or checkpoint",
        )
    if config.checkpoint is not None and config.language_model is not None:
        raise ConfigError.at("model", "both checkpoint and language_model are given", "leave one of them out")


def _quantization(quantize: Quantization | None, dtype: torch.dtype) -> dict[str, Any]:
    if quantize is None:
        return {}
    import importlib.util

    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError.at(
            "model.quantize", f"{quantize} needs bitsandbytes, which is not installed", "pip install bitsandbytes"
        )
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_UNQUANTIZED)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=_UNQUANTIZED,
        )
    }


def _keep_scales(model: LlavarForConditionalGeneration) -> None:
    """See to it that using quantized layers leaves their scales as they are. Seen with bitsandbytes 0.50.2.

    On a CPU with AVX512-bf16, Linear4bit rewrites its weight for a kernel of its own as soon as it answers, its scales
    rounded to bfloat16; a run that looks at answers between its steps could not be repeated, nor its base merged onto.

    Linear8bitLt takes a weight that somebody moved to the CPU, where it was, for a new one, whose scales (SCB) it looks
    for beside it; those of one in use are in the layer's state. DoRA does so in each forward pass (peft 0.21.2,
    peft/utils/integrations.py, ``dequantize_module_weight``).
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    def before(layer: Any, _: Any) -> None:
        if layer.weight.CB is not None and layer.weight.SCB is None and layer.state.SCB is not None:
            layer.state.CB, layer.weight.CB = layer.weight.CB, None

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.register_forward_pre_hook(before)
        elif isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _set_generation(model: LlavarForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    generation = model.generation_config
    generation.bos_token_id = tokenizer.bos_token_id
    generation.eos_token_id = tokenizer.eos_token_id
    generation.pad_token_id = tokenizer.pad_token_id
