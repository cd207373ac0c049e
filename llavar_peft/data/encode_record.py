"""Encode a record as ids and labels, which are built together turn by turn so that they always agree.

The text between special tokens is encoded in separate stretches; white space next to an image is stripped, as by the
original's tokenizer. For ordinary records the ids and labels are the original's.

Source: LLaVAR, llava/train/train.py, ``preprocess_multimodal`` and ``preprocess_v1``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby
from typing import Any

import numpy as np
import torch

from llavar_peft.constants import IGNORE_INDEX, IMAGE_PLACEHOLDER
from llavar_peft.data.conversation_template import (
    Content,
    Piece,
    images_to_front,
    split_placeholders,
)
from llavar_peft.data.image_preparation import prepare_image
from llavar_peft.data.image_roots import ImageRoots, OpenedImages
from llavar_peft.data.record_store import parse_record
from llavar_peft.data.text_encoder import TextEncoder, text_encoder, valid_unicode
from llavar_peft.errors import ConfigError, DataError
from llavar_peft.types import Conversation, EmbeddedImage, Example, ImageSource, Processor, TileLayout, Turn

OpensImages = ImageRoots | OpenedImages


@dataclass(slots=True)
class Encoding:
    """Ids and labels of a conversation's pieces.

    Attributes:
        ids: Token ids, starting with ``<s>``.
        labels: The ids at supervised positions and -100 elsewhere; as long as ``ids``.
        images: (start, end) of each image in ``ids``, in order.
    """

    ids: list[int]
    labels: list[int]
    images: list[tuple[int, int]] = field(default_factory=list)

    def add(self, ids: list[int], supervised_from: int) -> None:
        """Append ids, of which those from an index on are supervised."""
        self.ids += ids
        self.labels += [IGNORE_INDEX] * supervised_from + ids[supervised_from:]


def encode_record(
    record: Mapping[str, Any], processor: Processor, max_length: int, *, roots: OpensImages | None = None
) -> Example:
    """Encode a raw record for training.

    Args:
        record: The record as it is stored: ``id``, ``conversations`` or ``messages`` and, optionally, ``image``.
        processor: Tokenizer and image settings.
        max_length: Maximum number of tokens, image tokens included. A longer record is cut at its end; an image that
            does not fit completely is left out with everything after it.
        roots: The image folders; required only with tiles and in image mode ``"keep"``, which measure the images.

    Returns:
        Ids and labels. If the record cannot be trained on, no label remains and ``dropped`` is one of
        ``"no_answer"`` (only human turns), ``"empty_answer"`` (all answers are empty), ``"truncated_before_answer"``,
        ``"truncated_in_image"``.

    Raises:
        DataError: The record is malformed, or has more ``<image>`` than (several) images.
        ImageError: An image has to be measured and cannot be opened.
        ConfigError: The processor's tokenizer has no image tokens, or ``max_length`` is not positive.
    """
    name = record.get("id", "?") if isinstance(record, Mapping) else "?"
    conversation = parse_record(record, f"record {name!s}")
    return encode_conversation(conversation, processor, max_length, roots=roots)


def encode_conversation(
    conversation: Conversation, processor: Processor, max_length: int, *, roots: OpensImages | None = None
) -> Example:
    """Encode a validated record, as ``encode_record`` does."""
    if max_length < 1:
        raise ConfigError.at(
            "max_length", f"out of range (got {max_length}, expected at least 1)", "give the number of tokens"
        )
    contents = _split_turns(conversation, images_first=processor.sep_image_conv_front)
    contents = _without_images_beyond(contents, max_length + 1)
    images = _images_of_places(conversation, sum(part is None for content in contents for part in content))
    turns = zip((turn.role for turn in conversation.turns), contents, strict=True)
    pieces = list(processor.conversation_template.pieces(turns, system=conversation.system))
    layouts: tuple[TileLayout, ...] = ()
    if processor.tile_geometry is not None and images:
        num_text_tokens = len(encode_pieces(pieces, text_encoder(processor), [0] * len(images)).ids)
        sizes = _image_sizes(images, _required_roots(roots, images, conversation.id))
        layouts = tuple(processor.tile_geometry.layouts(sizes, max(0, max_length - num_text_tokens)))
        counts = tuple(processor.tile_geometry.tokens(layout) for layout in layouts)
    else:
        # The same image may have several places; it is measured once.
        count_of = {image: _image_tokens(image, processor, roots, conversation.id) for image in dict.fromkeys(images)}
        counts = tuple(count_of[image] for image in images)
    encoding = encode_pieces(pieces, text_encoder(processor), counts)

    end = _find_cut(encoding, max_length)
    num_images = sum(image_end <= end for _, image_end in encoding.images)
    labels = encoding.labels[:end]
    dropped = None
    if _is_unsupervised(labels):
        dropped = _why_unsupervised(conversation.turns, encoding, end, max_length)
    return Example(
        id=conversation.id,
        input_ids=_tensor(encoding.ids[:end]),
        labels=_tensor(labels),
        images=images[:num_images],
        image_token_counts=counts[:num_images],
        image_layouts=layouts[:num_images],
        dropped=dropped,
    )


def encode_pieces(pieces: Sequence[Piece], encoder: TextEncoder, image_tokens: Sequence[int]) -> Encoding:
    """Encode a conversation's pieces, without truncation.

    Args:
        pieces: From a conversation template.
        encoder: From ``text_encoder``.
        image_tokens: Number of image tokens of each ``image`` piece, in order.
    """
    encoding = Encoding([], [])
    if encoder.bos is not None:
        encoding.add([encoder.bos], 1)
    counts = iter(image_tokens)
    # Adjacent pieces of one kind. Text next to a special token loses its white space, so the neighbours are needed.
    runs = [(kind, list(run)) for kind, run in groupby(pieces, key=lambda piece: piece.kind)]
    edges = [_edge_tokens(run, encoder) for _, run in runs]
    for index, (kind, run) in enumerate(runs):
        if kind == "text":
            before = edges[index - 1][1] if index else None
            after = edges[index + 1][0] if index + 1 < len(runs) else None
            _add_text(encoding, run, encoder, before=before, after=after)
        elif kind == "special":
            for piece in run:
                encoding.add([encoder.special[piece.text]], 0 if piece.supervised else 1)
        else:
            for _ in run:
                block = encoder.image_block(next(counts))
                encoding.images.append((len(encoding.ids), len(encoding.ids) + len(block)))
                encoding.add(block, len(block))
    return encoding


def _edge_tokens(run: Sequence[Piece], encoder: TextEncoder) -> tuple[int | None, int | None]:
    """Return the first and the last special token of adjacent pieces of one kind; None for text."""
    if run[0].kind == "text":
        return None, None
    if run[0].kind == "special":
        return encoder.special[run[0].text], encoder.special[run[-1].text]
    block = encoder.image_block(1)
    return block[0], block[-1]


def _add_text(
    encoding: Encoding, run: Sequence[Piece], encoder: TextEncoder, *, before: int | None, after: int | None
) -> None:
    """Encode adjacent text pieces as one stretch, of which only the end can be supervised.

    Args:
        before: The special token before the stretch.
        after: The special token after it.
    """
    prompt = valid_unicode("".join(piece.text for piece in run if not piece.supervised))
    text = prompt + valid_unicode("".join(piece.text for piece in run if piece.supervised))
    answer_start = len(prompt)
    if after in encoder.strips_before:
        text = text.rstrip()
    if before in encoder.strips_after:
        stripped = text.lstrip()
        answer_start = max(0, answer_start - (len(text) - len(stripped)))
        text = stripped
    if text:
        encoding.add(*encoder.encode(text, answer_start, first=before is None))


def _split_turns(conversation: Conversation, *, images_first: bool) -> list[Content]:
    """Split each human turn at its images. Without an image ``<image>`` is ordinary text, as in the original.

    Args:
        conversation: The conversation.
        images_first: Whether the images of the first turn are moved to its front.
    """
    if not conversation.images:
        return [[turn.text] for turn in conversation.turns]
    # An answer may contain ``<image>`` as text, such as Markdown read off a page.
    contents = [_split_turn(turn) for turn in conversation.turns]
    if images_first and contents:
        contents[0] = images_to_front(contents[0])
    return contents


def _split_turn(turn: Turn) -> Content:
    if turn.parts is not None:
        return turn.parts
    return split_placeholders(turn.text) if turn.role == "human" else [turn.text]


def _without_images_beyond(contents: list[Content], most: int) -> list[Content]:
    """Leave out images that cannot fit, because each before them takes a token; a million would fill the memory."""
    if sum(content.count(None) for content in contents) <= most:
        return contents
    number = count()
    return [[part for part in content if part is not None or next(number) < most] for content in contents]


def _images_of_places(conversation: Conversation, placeholders: int) -> tuple[ImageSource, ...]:
    """Return the image at each ``<image>``: a single image of the record is that of all of them."""
    images = conversation.images
    if len(images) == 1:
        return images * placeholders
    if placeholders > len(images):
        raise DataError.at(
            f"record {conversation.id}",
            f"more {IMAGE_PLACEHOLDER} than images (got {placeholders}, expected {len(images)})",
            f"name one image for each {IMAGE_PLACEHOLDER}, or a single image for all of them",
        )
    return images[:placeholders]


def _image_tokens(image: ImageSource, processor: Processor, roots: OpensImages | None, record: str) -> int:
    """Return the number of tokens of an image; in image mode ``"keep"`` it depends on the image's size."""
    if processor.image_mode != "keep":
        return processor.num_image_tokens
    opened = _required_roots(roots, [image], record).open(image)
    height, width = prepare_image(opened, "keep", processor).shape[-2:]
    return (height // processor.patch_size) * (width // processor.patch_size)


def _image_sizes(images: Sequence[ImageSource], roots: OpensImages) -> list[tuple[int, int]]:
    """Return the (width, height) of each image; the same one is opened once."""
    size_of = {image: roots.open(image).size for image in dict.fromkeys(images)}
    return [size_of[image] for image in images]


def _required_roots(roots: OpensImages | None, images: Sequence[ImageSource], record: str) -> OpensImages:
    """Return the image folders; embedded images need none.

    Raises:
        DataError: They were not given.
    """
    if roots is not None:
        return roots
    if all(isinstance(image, EmbeddedImage) for image in images):
        return ImageRoots()
    raise DataError.at(
        f"record {record}",
        'no image folder was given, but tiles and image mode "keep" have to measure the images',
        "pass roots=ImageRoots(...), or give the folder with --images",
    )


def _find_cut(encoding: Encoding, max_length: int) -> int:
    """Return where to cut: at ``max_length``, or before an image that does not fit completely."""
    for start, end in encoding.images:
        if start < max_length < end:
            return start
    return min(max_length, len(encoding.ids))


def _is_unsupervised(labels: list[int]) -> bool:
    return labels.count(IGNORE_INDEX) == len(labels)


def _tensor(ids: list[int]) -> torch.Tensor:
    # Three times as fast as torch.tensor on a list.
    return torch.from_numpy(np.array(ids, dtype=np.int64))


def _why_unsupervised(turns: Sequence[Turn], encoding: Encoding, end: int, max_length: int) -> str:
    """Return why no label of a record is left; ``end`` is the number of tokens that remain of it."""
    if _is_unsupervised(encoding.labels):
        return "empty_answer" if any(turn.role == "gpt" for turn in turns) else "no_answer"
    return "truncated_in_image" if end < max_length else "truncated_before_answer"
