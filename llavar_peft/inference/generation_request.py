"""The values that go into decoding and come out of it: images, prompts, requests and answers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from llavar_peft.data.conversation_template import Content
from llavar_peft.data.encode_record import encode_pieces
from llavar_peft.data.image_files import decode_image
from llavar_peft.data.prepared_images import PreparedImage, image_inputs, prepare_record_images
from llavar_peft.data.text_encoder import text_encoder
from llavar_peft.errors import ConfigError, DataError
from llavar_peft.inference.token_sampling import Sampling
from llavar_peft.types import ImageMode, ReadableRepr, Role, TileLayout

if TYPE_CHECKING:
    from PIL.Image import Image

    from llavar_peft.inference.json_grammar import JsonGrammar
    from llavar_peft.models.processing_llavar import LlavarProcessor

ImageInput: TypeAlias = "Image | str | os.PathLike[str] | bytes | np.ndarray"
"""What can be asked about: see ``PromptImage.prepare``."""
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PromptImage(ReadableRepr):
    """A prepared image, and the features that were computed from it so far.

    Attributes:
        pixels: float32 ``[3, H, W]``, with tiles ``[V, 3, S, S]``.
        tokens: Number of ``<im_patch>`` tokens of the image.
        features: Projected features ``[tokens, D]``, by the name of the adapter whose projector computed them.
        layout: How the image is cut into tiles; None without tiles.
        detail: The second encoder's input; None without one.
        detail_features: The second encoder's features ``[F, C]``, by the name of the adapter as ``features``.
    """

    pixels: Tensor
    tokens: int
    features: dict[str | None, Tensor] = field(default_factory=dict, repr=False)
    layout: TileLayout | None = None
    detail: Tensor | None = field(default=None, repr=False)
    detail_features: dict[str | None, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def prepare(
        cls,
        image: ImageInput,
        processor: LlavarProcessor,
        mode: ImageMode | None = None,
        *,
        layout: TileLayout | None = None,
    ) -> PromptImage:
        """Open and prepare an image.

        Args:
            image: A local path (nothing is downloaded), a Pillow image, the bytes of an image file, or the pixels as a
                NumPy array, uint8 ``[H, W]`` or ``[H, W, 3]``.
            processor: The model's processor.
            mode: Overrides the processor's ``inference_image_mode``.
            layout: How it is cut into tiles; None chooses the best grid.

        Raises:
            ImageError: The image is missing or broken.
            ConfigError: It is none of these.
        """
        mode = mode or processor.inference_image_mode
        return cls.of(PreparedImage.prepare(_as_image(image), mode, processor, layout))

    @classmethod
    def of(cls, prepared: PreparedImage) -> PromptImage:
        """Return a prepared image, of which no features have been computed."""
        return cls(prepared.pixels, prepared.tokens, layout=prepared.layout, detail=prepared.detail)


def prepare_images(
    images: ImageInput | Sequence[ImageInput] | None,
    processor: LlavarProcessor,
    mode: ImageMode | None = None,
    *,
    earlier: Iterable[PromptImage] = (),
) -> list[PromptImage]:
    """Open and prepare the images of one question: none, one, or several in order.

    Args:
        images: The images, as in ``PromptImage.prepare``.
        processor: The model's processor.
        mode: Overrides the processor's ``inference_image_mode``.
        earlier: Images of earlier questions, with which they share the model's limit of image tokens.
    """
    if images is None:
        images = []
    image_list: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
    opened = [_as_image(image) for image in image_list]
    used_tokens = sum(image.tokens for image in earlier)
    prepared = prepare_record_images(opened, mode or processor.inference_image_mode, processor, used=used_tokens)
    return [PromptImage.of(image) for image in prepared]


def inputs_of_images(images: Sequence[PromptImage], device: torch.device) -> dict[str, Any]:
    """Return the model's arguments for images, on a device."""
    return image_inputs(
        [image.pixels.to(device) for image in images],
        [image.layout for image in images if image.layout is not None],
        [image.detail.to(device) for image in images if image.detail is not None],
    )


def _as_image(image: ImageInput) -> Image | str | Path:
    if isinstance(image, bytes | bytearray):
        return decode_image(bytes(image), "image")
    if isinstance(image, os.PathLike):
        return Path(image)
    if isinstance(image, str | PIL.Image.Image):
        return image
    got = type(image).__name__
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
            return PIL.Image.fromarray(image)
        got = f"{image.dtype} array {list(image.shape)}"
    what = f"got {got}, expected a path, a Pillow image, the bytes of a file, or a uint8 array [height, width, 3]"
    raise ConfigError.at("image", what, "convert it to one of these")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Prefix(ReadableRepr):
    """The keys and values of the beginning of a prompt.

    Attributes:
        ids: The tokens they were computed from, int64 ``[P]``.
        images: The images of these tokens in order; more may follow.
        layers: Keys and values of each layer, ``[1, heads, P, width]``.
    """

    ids: Tensor
    images: Sequence[PromptImage]
    layers: tuple[tuple[Tensor, Tensor], ...] = field(repr=False)

    def shared_with(self, ids: Tensor, images: Sequence[PromptImage], image_token_id: int) -> Prefix | None:
        """Return the part that is also the beginning of another prompt, or None if they share nothing.

        At least the last token of the other prompt is left to compute.

        Args:
            ids: The other prompt, int64 ``[T]``.
            images: The images of the other prompt.
            image_token_id: The token at the positions of images; it is the same for all images.
        """
        longest = min(len(self.ids), len(ids) - 1)
        differences = (self.ids[:longest] != ids[:longest]).nonzero()
        length = int(differences[0]) if len(differences) else longest
        # The same tokens may stand for other images: the part ends before the first image token of another image.
        shared_images = takewhile(lambda pair: pair[0] is pair[1], zip(self.images, images, strict=False))
        shared_tokens = sum(image.tokens for image, _ in shared_images)
        places = (ids[:length] == image_token_id).nonzero()
        length = int(places[shared_tokens]) if len(places) > shared_tokens else length
        if not length:
            return None
        layers = tuple((keys[:, :, :length], values[:, :, :length]) for keys, values in self.layers)
        return Prefix(self.ids[:length], self.images, layers)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Request(ReadableRepr):
    """A prompt, and how its answer is sampled.

    Attributes:
        ids: The prompt, int64 ``[T]``.
        images: The images in the order of their tokens in ``ids``.
        sampling: How the answer is sampled.
        adapter: Name of the adapter, None for the base.
        prefix: Keys and values of the beginning of the prompt, computed with the same adapter.
        keep_prefix: Whether the answer returns the keys and values of prompt and answer.
        grammar: What the answer has to follow, from ``Engine.grammars``; None leaves it free.

    Raises:
        DataError: The prompt is empty.
    """

    ids: Tensor
    images: Sequence[PromptImage] = ()
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str | None = None
    prefix: Prefix | None = None
    keep_prefix: bool = False
    grammar: JsonGrammar | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not len(self.ids):
            raise DataError.at("request", "the prompt has no tokens", "encode a question")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class Answer(ReadableRepr):
    """The answer to a request.

    Attributes:
        text: The text without special tokens, stripped of white space.
        ids: All chosen tokens, a closing ``</s>`` included.
        finish_reason: ``"stop"`` at ``</s>`` or a stop text, ``"length"`` at the limit of tokens or of the model's
            context (JSON then ends in the middle), ``"cancelled"`` if the caller ended it.
        prompt_tokens: Number of tokens of the prompt, image tokens included.
        logprobs: Log-probability of each of ``ids``, if requested.
        prefix: Keys and values of prompt and answer without its last token, if requested.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[float, ...] | None = None
    prefix: Prefix | None = field(default=None, repr=False)

    @property
    def completion_tokens(self) -> int:
        """Number of chosen tokens, a closing ``</s>`` included."""
        return len(self.ids)


def encode_messages(
    processor: LlavarProcessor,
    messages: Iterable[tuple[Role, Content]],
    images: Sequence[PromptImage],
    *,
    system: str | None = None,
) -> Tensor:
    """Encode a conversation up to the next answer. Nothing in its text becomes a special token.

    Args:
        processor: The model's processor.
        messages: Turns in order; the first and the last are the human's. None in a turn marks the place of an image.
        images: One image for each None, in order.
        system: The text before the first turn; None is the conversation template's own.

    Returns:
        Ids, int64 ``[T]``.

    Raises:
        DataError: The number of images is not the number of their places.
    """
    pieces = processor.conversation_template.pieces(messages, answer_next=True, system=system)
    places = sum(piece.kind == "image" for piece in pieces)
    if places != len(images):
        raise DataError.at("messages", f"have {places} places for {len(images)} images", "give one image for each")
    encoding = encode_pieces(pieces, text_encoder(processor), [image.tokens for image in images])
    return torch.tensor(encoding.ids, dtype=torch.int64)
