"""Decode an example to text with its supervised parts marked, for ``llavar-peft data inspect``."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from llavar_peft.constants import IGNORE_INDEX
from llavar_peft.data.text_encoder import TextEncoder, text_encoder
from llavar_peft.types import Example, Processor

_SPACE = "▁"


def decode_supervision(example: Example, processor: Processor) -> list[tuple[str, bool]]:
    """Decode an example to spans of text that are either supervised or not.

    Args:
        example: From ``encode_record``.
        processor: The processor that encoded it.

    Returns:
        (text, supervised) in reading order. An image is an unsupervised ``[image x576]``, and special tokens are
        written out. White space next to an image is missing because it is not encoded.
    """
    encoder = text_encoder(processor)
    specials = frozenset(encoder.special.values())
    spans: list[tuple[str, bool]] = []
    tokens = zip(example.input_ids.tolist(), (example.labels != IGNORE_INDEX).tolist(), strict=True)
    counts = iter(example.image_token_counts)
    after_special = True
    for (kind, supervised), run in groupby(tokens, key=lambda pair: (_kind(pair[0], encoder, specials), pair[1])):
        ids = [token for token, _ in run]
        if kind == "text":
            text = _decode(processor.tokenizer, ids, keep_space=not after_special)
        elif kind == "image":
            text = _images(ids.count(encoder.patch), counts)
        else:
            text = "".join(processor.tokenizer.convert_ids_to_tokens(ids))
        after_special = kind != "text"
        if spans and spans[-1][1] == supervised:
            text = spans.pop()[0] + text
        spans.append((text, supervised))
    return spans


def _images(patches: int, counts: Iterator[int]) -> str:
    """Return the text for a run of image tokens, which may belong to several adjacent images."""
    text = ""
    while patches > 0:
        tokens = next(counts, patches)
        text += f"[image x{tokens}]"
        patches -= tokens
    return text


def _kind(token: int, encoder: TextEncoder, specials: frozenset[int]) -> str:
    if token in (encoder.patch, encoder.start, encoder.end):
        return "image"
    return "special" if token in specials else "text"


def _decode(tokenizer: Any, ids: list[int], *, keep_space: bool) -> str:
    """Decode text ids. The decoder strips a leading space, which is part of the text except after a special token."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    leads = str(tokenizer.convert_ids_to_tokens(ids[0])).startswith(_SPACE)
    return f" {text}" if keep_space and leads else text
