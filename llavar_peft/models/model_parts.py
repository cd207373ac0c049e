"""Everything that a model is put together from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llavar_peft.models.llavar_config import LlavarConfig
from llavar_peft.types import ImageMode

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything a model is put together from.

    Attributes:
        source: What to call it in messages.
        config: The whole model's configuration.
        tensors: All tensors by our names, unchecked.
        tokenizer: With the image tokens added.
        image_processor: CLIP's, the Pillow one.
        image_mode: How images are prepared in training.
        inference_image_mode: How images are prepared when the model is asked.
    """

    source: str
    config: LlavarConfig
    tensors: dict[str, Tensor]
    tokenizer: PreTrainedTokenizerFast
    image_processor: CLIPImageProcessorPil
    image_mode: ImageMode
    inference_image_mode: ImageMode
