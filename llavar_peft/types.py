"""The types that several packages share: mainly those of the data on its way through the package.

JSON record -> ``Conversation`` -> ``Example`` -> ``Batch`` -> loss.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypedDict

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Role = Literal["human", "gpt"]
TemplateName = Literal["llava_v1", "vicuna_v1", "chat"]
"""How a conversation is written: as LLaVAR does, as LLaVA-1.5 does, or by the tokenizer's own chat template."""
ImageMode = Literal["pad", "square", "keep", "pad_black"]
"""Conversion of an image to a tensor; see ``llavar_peft.data.image_preparation``."""
Quantization = Literal["nf4", "int8"]
"""How base weights are stored in fewer bits."""
BadImagePolicy = Literal["stop", "skip"]
"""What is done about a missing or broken image."""
TileLayout = tuple[int, int, int, int]
"""How an image is cut: rows and columns of tiles, then rows and columns of their patches without padding, pooled."""


def expand_home(path: str | os.PathLike[str]) -> Path:
    """Return a path of the user's, in which ``~`` and ``~user`` are homes; an unknown user stays as it is.

    Every setting, option and argument that is a path goes through this, so that a path means the same everywhere.
    """
    return Path(os.path.expanduser(path))


class ReadableRepr:
    """Base of dataclasses (with ``repr=False``): shows the fields that are not at their default, on one screen."""

    __slots__ = ()
    _most_entries: ClassVar[int] = 3
    _most_characters: ClassVar[int] = 80

    def __rich_repr__(self) -> Iterator[tuple[str, object] | tuple[str, object, object]]:
        """Yield the fields for ``rich``, which leaves out those at their default."""
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if not field.repr:
                continue
            if field.default is not MISSING:
                yield field.name, value, field.default
            elif field.default_factory is not MISSING:
                yield field.name, value, field.default_factory()
            elif hasattr(value, "untyped_storage"):  # a tensor, whose numbers tell nothing
                yield field.name, _Shown(f"<{value.dtype} {list(value.shape)}>")
            else:
                yield field.name, value

    def __repr__(self) -> str:
        from rich.pretty import pretty_repr

        return pretty_repr(self, max_width=100, max_length=self._most_entries, max_string=self._most_characters)


class _Shown(str):
    """A text that is shown without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedImage:
    """An image that a record contains as the bytes of its file. Equal only to itself.

    Attributes:
        data: The bytes; in a table a view of the mapped file, so that they are read only when they are used.
        name: Its name in messages: the key in the record, and the path written next to the bytes.
        path: The path written next to the bytes, of which nothing is read; it may name a page of a PDF document.
    """

    data: bytes | memoryview
    name: str
    path: str | None = None

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"EmbeddedImage({len(self.data):,} bytes, {self.name!r})"

    def __reduce__(self) -> tuple[type[EmbeddedImage], tuple[bytes, str, str | None]]:
        return EmbeddedImage, (bytes(self.data), self.name, self.path)


ImageSource = str | EmbeddedImage
"""An image of a record: its path as written in the record, or its bytes."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: The speaker, named as in the released data.
        text: The message; ``<image>`` marks the position of an image.
        parts: Literal text, and None for each image, where the record gives them apart: then ``<image>`` in the text
            is text. None splits ``text`` at ``<image>``.
    """

    role: Role
    text: str
    parts: tuple[str | None, ...] | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Conversation(ReadableRepr):
    """A validated record.

    Attributes:
        id: The record's id, as a string.
        turns: Alternating turns, a human one first. A leading ``gpt`` turn of the record is dropped, as in LLaVAR.
        images: The record's images in order: paths as written in the record, or their bytes.
        system: The text before the first turn; None is the template's own.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...] = ()
    system: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Example(ReadableRepr):
    """A tokenized conversation whose images are not opened yet.

    Attributes:
        id: The record's id.
        input_ids: Token ids, int64 ``[T]``.
        labels: The ids at supervised positions and -100 elsewhere, int64 ``[T]``.
        images: The images that have a position in ``input_ids``, in order, as written in the record.
        image_token_counts: Number of ``<im_patch>`` tokens of each of ``images``.
        image_layouts: How each of ``images`` is cut into tiles; empty for a model without tiles.
        dropped: A short machine-readable reason if the record cannot be used for training, else None.
    """

    id: str
    input_ids: Tensor
    labels: Tensor
    images: tuple[ImageSource, ...] = ()
    image_token_counts: tuple[int, ...] = ()
    image_layouts: tuple[TileLayout, ...] = ()
    dropped: str | None = None

    @property
    def supervised(self) -> int:
        """Number of supervised positions."""
        return int((self.labels != -100).sum())


class Batch(TypedDict, total=False):
    """The arguments of the model's ``forward``.

    ``input_ids``, ``labels``, ``attention_mask``: int64 ``[B, T]``; ``pixel_values``: float32 ``[N, 3, H, W]`` for all
    images of the batch in reading order, absent if there are none. With tiles, ``pixel_values`` has the views of all
    images, and ``image_layouts`` says how each image is cut; ``detail_values`` is the input of the second encoder.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    pixel_values: Tensor
    image_layouts: tuple[TileLayout, ...]
    detail_values: Tensor


class Processor(Protocol):
    """The parts of a processor that the data code uses, for example of ``llavar_peft.models.LlavarProcessor``."""

    tokenizer: Any
    image_processor: Any
    image_mode: ImageMode
    inference_image_mode: ImageMode
    patch_size: int
    use_im_start_end: bool
    sep_image_conv_front: bool
    image_token: str

    @property
    def conversation_template(self) -> Any:
        """How conversations are written, with the methods of ``RoleTemplate``."""
        ...

    @property
    def image_side(self) -> int:
        """Side of a prepared image in pixels."""
        ...

    @property
    def num_image_tokens(self) -> int:
        """Number of ``<im_patch>`` tokens of an image in the tower's square size; with tiles, the largest number."""
        ...

    @property
    def tile_geometry(self) -> Any:
        """How images are cut into tiles, a ``TileGeometry``; None for a model without tiles."""
        ...

    @property
    def detail_grid(self) -> int | None:
        """Rows, and columns, of the crops for the cross-attention; None for a model without them."""
        ...

    @property
    def detail_processor(self) -> Any:
        """The image processor of the cross-attention's own encoder; None for a model without one."""
        ...


class ImageLoader(Protocol):
    """Open an image by the path written in the record."""

    def __call__(self, path: str) -> Image:
        """Return the image upright, in RGB. Raises ``ImageError``."""
        ...


@dataclass(frozen=True)
class LayerCost:
    """Memory that one layer keeps for its backward pass.

    Attributes:
        per_token: Bytes for each token.
        constant: Bytes that do not depend on the tokens: under autocast, the weights in half precision.
        input_per_token: Bytes for each token of the layer's input, which a layer that recomputes keeps.
    """

    per_token: float
    constant: int
    input_per_token: float

    def kept(self, tokens: int) -> float:
        """Return the bytes of a layer that keeps its activations."""
        return self.per_token * tokens + self.constant
