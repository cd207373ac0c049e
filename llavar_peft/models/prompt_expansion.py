"""The text of prompts, in which each ``<image>`` becomes an image's tokens, and the options of the processor's call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from llavar_peft.constants import IMAGE_PLACEHOLDER
from llavar_peft.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

# The tokenizer's options that __call__ accepts. Truncation is not one of them: it could cut an image's tokens.
_TEXT_OPTIONS: Final = frozenset({
    "padding", "padding_side", "max_length", "pad_to_multiple_of", "return_attention_mask", "return_offsets_mapping",
    "return_token_type_ids", "verbose",
})  # fmt: skip


def check_options(options: dict[str, Any]) -> None:
    """Reject options that the processor does not have, and drop those that ``apply_chat_template`` always passes.

    Args:
        options: By name; changed in place.

    Raises:
        DataError: Names them.
    """
    for name in ("audio", "videos"):  # apply_chat_template always passes them
        if options.pop(name, None):
            raise DataError.at("processor", f"got {name}, which this model does not support", "remove them")
    if options.pop("truncation", False):
        raise DataError.at(
            "processor", "got truncation, which could cut an image's tokens", "shorten the prompt's text instead"
        )
    unknown = sorted(set(options) - _TEXT_OPTIONS)
    if unknown:
        raise DataError.at(
            "processor",
            f"got unknown options {', '.join(unknown)} (expected some of {', '.join(sorted(_TEXT_OPTIONS))})",
            "remove them",
        )


def flat_images(images: Any) -> list[Image | str]:
    """Return images that are given alone, as a list, or as a list for each prompt, as one list."""
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [images]
    return [image for entry in images for image in flat_images(entry)]


def expand_prompts(
    prompts: Sequence[str], blocks: Sequence[str], bos: str
) -> tuple[list[str], list[list[dict[str, Any]]]]:
    """Replace each ``<image>`` by an image's tokens, in order over all prompts, and start each prompt with ``bos``.

    Args:
        prompts: The texts.
        blocks: The tokens of each image, as text.
        bos: The first token's text, or an empty string.

    Returns:
        The texts, and the replacements in each of them, in the format that ``ProcessorMixin`` reads.
    """
    places = sum(prompt.count(IMAGE_PLACEHOLDER) for prompt in prompts)
    if places != len(blocks):
        raise DataError.at(
            "processor",
            f"expected one image per placeholder (got {len(blocks)} images for {places} {IMAGE_PLACEHOLDER})",
            f"pass one image for each {IMAGE_PLACEHOLDER}",
        )
    remaining = iter(blocks)
    texts, offsets = [], []
    for prompt in prompts:
        first, *rest = prompt.split(IMAGE_PLACEHOLDER)
        text = "" if prompt.startswith(bos) else bos
        replaced = [_replacement("", 0, text, 0)] if text else []
        text, read = text + first, len(first)
        for part in rest:
            block = next(remaining)
            replaced.append(_replacement(IMAGE_PLACEHOLDER, read, block, len(text)))
            text, read = text + block + part, read + len(IMAGE_PLACEHOLDER) + len(part)
        texts.append(text)
        offsets.append(replaced)
    return texts, offsets


def _replacement(old: str, start: int, new: str, new_start: int) -> dict[str, Any]:
    return {
        "type": "image",
        "span": (start, start + len(old)),
        "new_span": (new_start, new_start + len(new)),
        "text": old,
        "replacement": new,
    }
