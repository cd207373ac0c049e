"""Each form of the data has one type, and the data flows one way.

JSON record -> ``Conversation`` -> ``Example`` -> ``Batch`` -> loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Role = Literal["human", "gpt"]
ImageMode = Literal["pad", "square", "keep", "pad_black"]
"""How an image becomes a tensor: see ``llavar_peft.data.image_preparation``."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One side's words.

    Attributes:
        role: Who speaks, in the released data's spelling.
        text: The words; ``<image>`` marks the place of an image.
    """

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A record, validated.

    Attributes:
        id: The record's id, as a string.
        turns: Alternating, a human turn first (a leading ``gpt`` turn is dropped, as in the original).
        images: Relative paths as written in the record, in order; empty for a text-only record.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation as the model sees it, before its images are opened.

    Attributes:
        id: The record's id.
        input_ids: Token ids, int64 ``[T]``.
        labels: The ids at supervised positions and -100 elsewhere, int64 ``[T]``.
        images: The images that have a place in ``input_ids``, in order, as written in the record.
        image_token_counts: How many ``<im_patch>`` each of ``images`` takes.
        dropped: Why this record cannot be trained on, as a short machine-readable reason, else None.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    images: tuple[str, ...] = ()
    image_token_counts: tuple[int, ...] = ()
    dropped: str | None = None

    @property
    def supervised(self) -> int:
        """Number of positions that carry loss."""
        return int((self.labels != -100).sum())


class Batch(TypedDict, total=False):
    """What the model's ``forward`` takes.

    ``input_ids``, ``labels``, ``attention_mask``: int64 ``[B, T]``; ``pixel_values``: float32 ``[N, 3, H, W]`` for all
    images of the batch in reading order, absent when there are none.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    pixel_values: Tensor


class Processor(Protocol):
    """What the data code needs to know of a processor (``llavar_peft.models.LlavarProcessor`` is one)."""

    tokenizer: Any
    image_processor: Any
    image_mode: ImageMode
    inference_image_mode: ImageMode
    patch_size: int
    use_im_start_end: bool
    sep_image_conv_front: bool

    @property
    def num_image_tokens(self) -> int:
        """Number of ``<im_patch>`` for one image of the tower's square size."""
        ...


class ImageLoader(Protocol):
    """Opens a record's image by the path written in the record."""

    def __call__(self, path: str) -> Image:
        """Return the image upright, in RGB. Raises ``ImageError``."""
        ...
