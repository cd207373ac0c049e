"""Answers of transformers' own ``generate``, which the engine has to equal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from llavar_peft.data.image_preparation import prepare_image
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.types import ImageMode


def greedy_answers(
    model: Any,
    processor: LlavarProcessor,
    questions: Sequence[str],
    images: Sequence[Image | Path | None],
    *,
    max_new_tokens: int,
    image_mode: ImageMode | None = None,
) -> list[str]:
    """Answer one question about each image, as one batch that is padded on the left."""
    prompts, pixels = [], []
    for question, image in zip(questions, images, strict=True):
        tokens = processor.num_image_tokens
        if image is not None:
            pixels.append(prepare_image(image, image_mode or processor.inference_image_mode, processor))
            tokens = (pixels[-1].shape[-2] // processor.patch_size) * (pixels[-1].shape[-1] // processor.patch_size)
        prompts.append(processor.encode_question(question, image=image is not None, num_image_tokens=tokens)[0])
    width = max(map(len, prompts))
    padding = processor.tokenizer.pad_token_id
    ids = torch.stack([torch.nn.functional.pad(one, (width - len(one), 0), value=padding) for one in prompts])
    mask = torch.stack([(torch.arange(width) >= width - len(one)).long() for one in prompts])
    same_size = len({tuple(one.shape) for one in pixels}) == 1
    shown = {"pixel_values": torch.stack(pixels) if same_size else pixels} if pixels else {}
    with torch.no_grad():
        made = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, **shown
        )
    return [text.strip() for text in processor.tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)]
