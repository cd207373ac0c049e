"""Makes ``transformers``' Auto classes know a LLaVAR folder."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from llavar_peft.constants import MODEL_TYPE
from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.models.modeling_llavar import LlavarForConditionalGeneration, LlavarModel
from llavar_peft.models.processing_llavar import LlavarProcessor


def register() -> None:
    """Register configuration, models and processor; calling it again does nothing.

    ``build_model``, ``Trainer`` and ``load_reader`` call it; call it yourself before ``AutoModel...from_pretrained``.
    """
    AutoConfig.register(MODEL_TYPE, LlavarConfig, exist_ok=True)
    AutoModel.register(LlavarConfig, LlavarModel, exist_ok=True)
    AutoModelForImageTextToText.register(LlavarConfig, LlavarForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(LlavarConfig, LlavarProcessor, exist_ok=True)
