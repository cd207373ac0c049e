"""The original's data pipeline, rewritten for current packages, with which ``data.py`` compares ours.

The tokenizer is the slow SentencePiece one in Python, called as in ``preprocess_v1``: for the conversation, then again
for every round and every round's instruction. Images are processed by ``expand2square`` and ``CLIPImageProcessor``.

Source: LLaVAR, llava/train/train.py, ``preprocess_multimodal``, ``preprocess_v1``, ``LazySupervisedDataset``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import AddedToken
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from llavar_peft.constants import (
    ADDED_TOKENS,
    ASSISTANT_ROLE,
    BOS_TOKEN,
    EOS_TOKEN,
    IGNORE_INDEX,
    IMAGE_END_TOKEN,
    IMAGE_PATCH_TOKEN,
    IMAGE_PLACEHOLDER,
    IMAGE_START_TOKEN,
    PAD_TOKEN,
    SYSTEM_PROMPT,
    UNK_TOKEN,
    USER_ROLE,
)

_SEPARATORS = (" ", EOS_TOKEN)


class SlowTokenizer(SentencePieceBackend):
    """``LlamaTokenizer`` as transformers 4.28 had it under ``use_fast=False``: ``<s>`` first, padded on the right.

    Args:
        model: The ``tokenizer.model``.
        max_length: Number of tokens at which a conversation is cut.
    """

    def __init__(self, model: Path, max_length: int) -> None:
        plain = {
            name: AddedToken(token, normalized=False, special=True)
            for name, token in (("bos_token", BOS_TOKEN), ("eos_token", EOS_TOKEN), ("unk_token", UNK_TOKEN))
        }
        super().__init__(
            vocab_file=str(model), legacy=True, pad_token=PAD_TOKEN, model_max_length=max_length, padding_side="right",
            **plain,
        )  # fmt: skip
        # The original adds plain strings, which then meant stripping white space on both sides.
        stripping = [
            AddedToken(name, lstrip=True, rstrip=True, normalized=False, special=True) for name in ADDED_TOKENS
        ]
        self.add_tokens(stripping)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Add ``<s>`` before a text."""
        return [self.bos_token_id, *token_ids_0]


def preprocess(sources: Sequence[dict[str, str]], tokenizer: SlowTokenizer, image_tokens: int) -> dict[str, Tensor]:
    """Convert one record's turns to ids and labels.

    Args:
        sources: The record's ``conversations``.
        tokenizer: The slow tokenizer.
        image_tokens: Number of ``<im_patch>`` for the image; 0 for a record without one.

    Returns:
        ``input_ids`` and ``labels``, ``[T]``.
    """
    turns = copy.deepcopy(sources)
    if image_tokens:
        for turn in turns:
            patches = IMAGE_START_TOKEN + IMAGE_PATCH_TOKEN * image_tokens + IMAGE_END_TOKEN
            turn["value"] = turn["value"].replace(IMAGE_PLACEHOLDER, patches)
    if turns[0]["from"] != "human":
        turns = turns[1:]
    prompt = _prompt(turns)
    input_ids = tokenizer(
        [prompt], return_tensors="pt", padding="longest", max_length=tokenizer.model_max_length, truncation=True
    ).input_ids
    labels = input_ids.clone()
    _mask(prompt, labels[0], tokenizer)
    return {"input_ids": input_ids[0], "labels": labels[0]}


def _prompt(turns: Sequence[dict[str, str]]) -> str:
    text = SYSTEM_PROMPT + _SEPARATORS[0]
    for number, turn in enumerate(turns):
        role, value = (USER_ROLE, ASSISTANT_ROLE)[number % 2], turn["value"]
        text += f"{role}: {value}{_SEPARATORS[number % 2]}" if value else f"{role}:"
    return text


def _mask(prompt: str, labels: Tensor, tokenizer: SlowTokenizer) -> None:
    """Mask the labels of everything but the answers, by counting the tokens of each round again."""
    tokens = int(labels.ne(tokenizer.pad_token_id).sum())
    separator = f"{_SEPARATORS[0]}{ASSISTANT_ROLE}: "
    position = 1
    labels[:position] = IGNORE_INDEX
    for part in prompt.split(_SEPARATORS[1]):
        halves = part.split(separator)
        if part == "" or len(halves) != 2:
            break
        length = len(tokenizer(part).input_ids)
        instruction = len(tokenizer(halves[0] + separator).input_ids) - 2
        labels[position : position + instruction] = IGNORE_INDEX
        position += length
    labels[position:] = IGNORE_INDEX
    if position < tokenizer.model_max_length and position != tokens:
        labels[:] = IGNORE_INDEX


def expand_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Center an image on a square of one colour."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def prepare(path: Path, processor: CLIPImageProcessorPil) -> Tensor:
    """Open and process an image as with ``--image_aspect_ratio pad``; return float32 ``[3, 336, 336]``."""
    image = Image.open(path).convert("RGB")
    image = expand_to_square(image, tuple(int(value * 255) for value in processor.image_mean))
    pixels: Any = processor.preprocess(image, return_tensors="pt")["pixel_values"]
    return pixels[0]
