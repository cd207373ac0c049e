"""What is asked of a model, and what it answers: the values that go into decoding and come out of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Literal, TypedDict

import torch
from torch import Tensor

from llavar_peft.constants import SYSTEM_PROMPT, TOP_K
from llavar_peft.data.conversation_template import Content, conversation_pieces
from llavar_peft.data.encode_record import encode_pieces
from llavar_peft.data.image_preparation import image_token_count, prepare_image
from llavar_peft.data.text_encoder import text_encoder
from llavar_peft.errors import ConfigError, DataError
from llavar_peft.types import ImageMode, Role

if TYPE_CHECKING:
    from pathlib import Path

    from PIL.Image import Image

    from llavar_peft.models.processing_llavar import LlavarProcessor

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How an answer is drawn. Defaults: LLaVAR, llava/eval/run_llava.py, on the transformers of its day.

    Attributes:
        max_new_tokens: Tokens at most, the closing ``</s>`` included.
        temperature: 0 is greedy.
        top_p: Share of the probability that is drawn from.
        top_k: Tokens that are drawn from at most, the likeliest ones; 0 for all.
        seed: Makes the draw repeatable, whatever else is in the batch.
        stop: Texts that end the answer, and are no part of it.
        logprobs: Whether the chosen tokens' log-probabilities (at temperature 1) are kept.

    Raises:
        ConfigError: A value out of its range.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.2
    top_p: float = 1.0
    top_k: int = TOP_K
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: bool = False

    def __post_init__(self) -> None:
        faults = (
            (self.max_new_tokens < 1, "max_new_tokens", self.max_new_tokens, "at least 1"),
            (not 0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more"),
            (not 0 < self.top_p <= 1, "top_p", self.top_p, "more than 0 and at most 1"),
            (self.top_k < 0, "top_k", self.top_k, "0 or more"),
            (self.seed is not None and not 0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1"),
            ("" in self.stop, "stop", self.stop, "a tuple of texts that are not empty"),
        )
        for wrong, name, got, expected in faults:
            if wrong:
                raise ConfigError.at(name, f"got {got!r}, expected {expected}", "change it")


class SamplingSettings(TypedDict, total=False):
    """The fields of ``Sampling``, for functions that take them by name."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: tuple[str, ...]
    logprobs: bool


@dataclass(frozen=True, slots=True, eq=False)
class PromptImage:
    """A prepared image, with what a model saw in it once it has looked.

    Attributes:
        pixels: float32 ``[3, H, W]``.
        tokens: How many ``<im_patch>`` it takes.
        features: The projected features ``[tokens, D]``, by the name of the adapter whose projector made them.
    """

    pixels: Tensor
    tokens: int
    features: dict[str | None, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def prepare(
        cls, image: Image | str | Path, processor: LlavarProcessor, mode: ImageMode | None = None
    ) -> PromptImage:
        """Open and prepares an image.

        Args:
            image: An image or a local path; never fetched from the net.
            processor: The model's.
            mode: Instead of the processor's ``inference_image_mode``.

        Returns:
            The image, not looked at yet.

        Raises:
            ImageError: It is missing or broken.
        """
        pixels = prepare_image(image, mode or processor.inference_image_mode, processor)
        return cls(pixels, image_token_count(pixels, processor.patch_size))


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """The keys and values of a prompt's beginning.

    Attributes:
        ids: What they were computed from, int64 ``[P]``.
        images: Those in it, and perhaps more, in order.
        layers: Keys and values of each layer, ``[1, heads, P, width]``.
    """

    ids: Tensor
    images: Sequence[PromptImage]
    layers: tuple[tuple[Tensor, Tensor], ...] = field(repr=False)

    def shared_with(self, ids: Tensor, images: Sequence[PromptImage], image_token_id: int) -> Prefix | None:
        """The part of it that also begins another prompt, of which at least the last token is left to compute.

        Args:
            ids: The other prompt, int64 ``[T]``.
            images: Those in it.
            image_token_id: What stands in their places; two images look alike there.

        Returns:
            That part; None if there is none.
        """
        longest = min(len(self.ids), len(ids) - 1)
        differs = (self.ids[:longest] != ids[:longest]).nonzero()
        length = int(differs[0]) if len(differs) else longest
        same = takewhile(lambda pair: pair[0] is pair[1], zip(self.images, images, strict=False))
        known = sum(image.tokens for image, _ in same)
        places = (ids[:length] == image_token_id).nonzero()
        length = int(places[known]) if len(places) > known else length
        if not length:
            return None
        layers = tuple((keys[:, :, :length], values[:, :, :length]) for keys, values in self.layers)
        return Prefix(self.ids[:length], self.images, layers)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One answer that is wanted.

    Attributes:
        ids: The prompt, int64 ``[T]``.
        images: In the order of their places in ``ids``.
        sampling: How the answer is drawn.
        adapter: The adapter's name, None for the base.
        prefix: Keys and values of the prompt's beginning, by this adapter, if they are there already.
        keep_prefix: Whether the answer comes with the keys and values of all of it.

    Raises:
        DataError: The prompt is empty.
    """

    ids: Tensor
    images: Sequence[PromptImage] = ()
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str | None = None
    prefix: Prefix | None = None
    keep_prefix: bool = False

    def __post_init__(self) -> None:
        if not len(self.ids):
            raise DataError.at("request", "the prompt has no tokens", "encode a question")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """What came of a request.

    Attributes:
        text: Without special tokens, without white space at the ends.
        ids: All tokens chosen, a closing ``</s>`` included.
        finish_reason: ``"stop"`` at ``</s>`` or a stop text, ``"length"`` at the limit of tokens or of the model's
            context, ``"cancelled"`` if nobody wanted the rest.
        prompt_tokens: Of the prompt, image tokens included.
        logprobs: For each of ``ids``, if asked for.
        prefix: Keys and values of prompt and answer but its last token, if asked for.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[float, ...] | None = None
    prefix: Prefix | None = field(default=None, repr=False)

    @property
    def completion_tokens(self) -> int:
        """Number of tokens chosen, a closing ``</s>`` included."""
        return len(self.ids)


def question_content(words: str, image: PromptImage | None) -> Content:
    """A question as the original lays it out: the words, then a line break and the image.

    Source: LLaVAR, llava/eval/run_llava.py, ``eval_model``.
    """
    return [words] if image is None else [f"{words}\n", None]


def encode_messages(
    processor: LlavarProcessor,
    messages: Iterable[tuple[Role, Content]],
    images: Sequence[PromptImage],
    *,
    system: str = SYSTEM_PROMPT,
) -> Tensor:
    """Encode a conversation that the model is to go on with. Nothing in its words becomes a special token.

    Args:
        processor: The model's.
        messages: Turns in order, beginning and ending with the human; None in a turn stands for an image.
        images: One for each None, in order.
        system: The text before the first turn.

    Returns:
        Ids, int64 ``[T]``.

    Raises:
        DataError: There are more or fewer places than images.
    """
    pieces = conversation_pieces(messages, answer_next=True, system=system)
    places = sum(piece.kind == "image" for piece in pieces)
    if places != len(images):
        raise DataError.at("messages", f"have {places} places for {len(images)} pictures", "give one for each")
    encoding = encode_pieces(pieces, text_encoder(processor), [image.tokens for image in images])
    return torch.tensor(encoding.ids, dtype=torch.int64)
