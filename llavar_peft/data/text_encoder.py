"""Text to ids in which no special token is ever recognised, whatever the text spells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from llavar_peft.constants import ADDED_TOKENS, IMAGE_END_TOKEN, IMAGE_PATCH_TOKEN, IMAGE_START_TOKEN
from llavar_peft.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from llavar_peft.types import Processor


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A tokenizer's pieces without its special tokens, and their ids beside them.

    Attributes:
        pieces: The bare backend: the same vocabulary and merges, no added tokens.
        bos: Id of ``<s>``.
        eos: Id of ``</s>``.
        patch: Id of ``<im_patch>``.
        start: Id of ``<im_start>``, None where it is not used.
        end: Id of ``<im_end>``, None where it is not used.
    """

    pieces: Tokenizer
    bos: int
    eos: int
    patch: int
    start: int | None
    end: int | None

    def encode(self, text: str, answer_start: int | None = None) -> tuple[list[int], int]:
        """Encodes one stretch of text between special tokens.

        Args:
            text: Any text that is not empty, of ``whole_characters``.
            answer_start: Index of the first supervised character.

        Returns:
            The ids, and the index of the first id that holds a supervised character (their number if none does).
        """
        encoding = self.pieces.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if answer_start is None or answer_start >= len(text):
            return ids, len(ids)
        first = 0 if answer_start == 0 else encoding.char_to_token(answer_start)
        return ids, len(ids) if first is None else first

    def image_block(self, tokens: int) -> list[int]:
        """The ids of a picture's place, with ``tokens`` x ``<im_patch>``."""
        patches = [self.patch] * tokens
        return patches if self.start is None or self.end is None else [self.start, *patches, self.end]


def text_encoder(processor: Processor) -> TextEncoder:
    """The encoder of a processor, made once for each of its settings.

    Args:
        processor: Its tokenizer and ``use_im_start_end`` count.

    Returns:
        The encoder.

    Raises:
        ConfigError: The tokenizer is a slow one, or has no image tokens.
    """
    made = _ENCODERS.setdefault(processor.tokenizer, {})
    if processor.use_im_start_end not in made:
        made[processor.use_im_start_end] = _make(processor.tokenizer, processor.use_im_start_end)
    return made[processor.use_im_start_end]


# Keyed by the tokenizer itself, so that a worker process, which gets a copy, makes its own.
_ENCODERS: WeakKeyDictionary[Any, dict[bool, TextEncoder]] = WeakKeyDictionary()


def _make(tokenizer: Any, use_im_start_end: bool) -> TextEncoder:
    from tokenizers import Tokenizer

    where = str(tokenizer.name_or_path or type(tokenizer).__name__)
    if not tokenizer.is_fast:
        raise ConfigError.at(where, "is a slow tokenizer", "open it with llavar_peft.models.tokenizer.load_tokenizer")
    vocabulary = tokenizer.get_vocab()
    names = ADDED_TOKENS if use_im_start_end else (IMAGE_PATCH_TOKEN,)
    missing = [name for name in names if name not in vocabulary]
    if missing:
        raise ConfigError.at(
            where, f"has no token {', '.join(missing)}", "call llavar_peft.models.tokenizer.add_image_tokens on it"
        )
    backend = tokenizer.backend_tokenizer
    bare = Tokenizer(backend.model)
    bare.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        bare.pre_tokenizer = backend.pre_tokenizer
    start, end = (vocabulary[name] if name in names else None for name in (IMAGE_START_TOKEN, IMAGE_END_TOKEN))
    return TextEncoder(bare, tokenizer.bos_token_id, tokenizer.eos_token_id, vocabulary[IMAGE_PATCH_TOKEN], start, end)


def whole_characters(text: str) -> str:
    """Joins surrogate pairs and replaces lone surrogates, which JSON can hold and UTF-8 cannot."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
