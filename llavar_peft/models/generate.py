"""Asking a model about images, greedily or not, in batches: the part that training's probe and inference share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llavar_peft.constants import TOP_K
from llavar_peft.data.image_preparation import prepare_image
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.types import ImageMode

if TYPE_CHECKING:
    from PIL.Image import Image


def answer_images(  # noqa: PLR0913 - the knobs of generation, by name
    model: nn.Module,
    processor: LlavarProcessor,
    questions: Sequence[str],
    images: Sequence[Image | Tensor | None],
    *,
    max_new_tokens: int,
    image_mode: ImageMode | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = TOP_K,
    seed: int | None = None,
) -> list[str]:
    """Answer one question about each image, as one batch.

    Rows are padded on the left, so that a batch answers as its rows would alone.

    Args:
        model: A LLaVAR, or a ``PeftModel`` around one.
        processor: Its processor.
        questions: B questions.
        images: B images, or ``[3, H, W]`` already prepared, or None for a question without an image.
        max_new_tokens: Tokens at most for each answer.
        image_mode: Overrides the processor's ``inference_image_mode``.
        temperature: 0 is greedy.
        top_p: Share of the probability that is sampled from.
        top_k: Tokens that are sampled from at most; 0 for all. The default is the original's.
        seed: Makes sampling repeatable; the global generator is left as it was.

    Returns:
        B answers, without special tokens and without white space at the ends.
    """
    mode = image_mode or processor.inference_image_mode
    device = next(model.parameters()).device
    prompts, pixels = [], []
    for question, image in zip(questions, images, strict=True):
        tokens = processor.num_image_tokens
        if image is not None:
            prepared = image if isinstance(image, Tensor) else prepare_image(image, mode, processor)
            tokens = (prepared.shape[-2] // processor.patch_size) * (prepared.shape[-1] // processor.patch_size)
            pixels.append(prepared.to(device))
        prompts.append(processor.encode_question(question, image=image is not None, num_image_tokens=tokens)[0])
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), processor.tokenizer.pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = prompt
        attention_mask[row, width - len(prompt) :] = 1
    inputs: dict[str, Any] = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
    if pixels:
        same = len({tuple(opened.shape) for opened in pixels}) == 1
        inputs["pixel_values"] = torch.stack(pixels) if same else pixels
    if temperature > 0:
        inputs.update(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k)
    else:
        inputs.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    # Not inference_mode: what an engine of sharded weights gathers here and keeps, a backward pass has to use.
    with torch.random.fork_rng(enabled=temperature > 0), torch.no_grad():
        if temperature > 0 and seed is not None:
            torch.manual_seed(seed)
        generated = model.generate(max_new_tokens=max_new_tokens, **inputs)  # type: ignore[operator]
    answers = processor.tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
