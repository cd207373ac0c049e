"""Text to ids in which no special token is ever recognised, whatever the text spells.

No piece of LLaMA's reaches from the end of one word into the next, so that words are encoded one by one, and each only
when it is first met: faster than whole texts, with the same ids.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from llavar_peft.constants import ADDED_TOKENS, IMAGE_END_TOKEN, IMAGE_PATCH_TOKEN, IMAGE_START_TOKEN
from llavar_peft.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from llavar_peft.types import Processor

_SPACE: Final = "▁"
_NORMALIZERS: Final = [
    {"type": "Prepend", "prepend": _SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
]
_WORD: Final = re.compile(f"{_SPACE}*[^{_SPACE}]+|{_SPACE}+")
_ACROSS_WORDS: Final = re.compile(f"[^{_SPACE}]{_SPACE}")
_WORDS_KEPT: Final = 2**15
"""About 8 MB in every worker."""
_LONGEST_KEPT: Final = 32  # characters; what is longer is seldom met again


class Words:
    """The ids of words: a space and what follows it up to the next.

    Args:
        pieces: A backend that takes its text as it is.
    """

    def __init__(self, pieces: Tokenizer) -> None:
        self._pieces = pieces
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Encode a text in which ``▁`` stands for spaces."""
        ids: list[int] = []
        known = self._known
        for word in _WORD.findall(text):
            ids += known.get(word) or self._new(word)
        return ids

    def _new(self, word: str) -> list[int]:
        ids: list[int] = self._pieces.encode(word, add_special_tokens=False).ids
        if len(self._known) < _WORDS_KEPT and len(word) <= _LONGEST_KEPT:
            self._known[word] = ids
        return ids


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A tokenizer's pieces without its special tokens, and their ids beside them.

    Attributes:
        pieces: The bare backend: the same vocabulary and merges, no added tokens.
        words: The same word by word; None for a tokenizer that is not of LLaMA's kind.
        bos: Id of ``<s>``.
        eos: Id of ``</s>``.
        patch: Id of ``<im_patch>``.
        start: Id of ``<im_start>``, None where it is not used.
        end: Id of ``<im_end>``, None where it is not used.
    """

    pieces: Tokenizer
    words: Words | None
    bos: int
    eos: int
    patch: int
    start: int | None
    end: int | None

    def encode(self, text: str, answer_start: int | None = None) -> tuple[list[int], int]:
        """Encode one stretch of text between special tokens.

        Args:
            text: Any text that is not empty, of ``whole_characters``.
            answer_start: Index of the first supervised character.

        Returns:
            The ids, and the index of the first id that holds a supervised character (their number if none does).
        """
        supervised = len(text) if answer_start is None else min(answer_start, len(text))
        if self.words is not None:
            spaced = _SPACE + text.replace(" ", _SPACE)
            if supervised in (0, len(text)):
                ids = self.words.encode(spaced)
                return ids, len(ids) if supervised else 0
            if _ACROSS_WORDS.match(spaced, supervised):
                prompt = self.words.encode(spaced[: supervised + 1])
                return prompt + self.words.encode(spaced[supervised + 1 :]), len(prompt)
        encoding = self.pieces.encode(text, add_special_tokens=False)
        whole: list[int] = encoding.ids
        if supervised == len(text):
            return whole, len(whole)
        first = 0 if supervised == 0 else encoding.char_to_token(supervised)
        return whole, len(whole) if first is None else first

    def image_block(self, tokens: int) -> list[int]:
        """The ids of an image's place, with ``tokens`` x ``<im_patch>``."""
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
        raise ConfigError.at(
            where, "is a slow tokenizer", "open it with llavar_peft.models.llama_tokenizer.load_tokenizer"
        )
    vocabulary = tokenizer.get_vocab()
    names = ADDED_TOKENS if use_im_start_end else (IMAGE_PATCH_TOKEN,)
    missing = [name for name in names if name not in vocabulary]
    if missing:
        raise ConfigError.at(
            where,
            f"has no token {', '.join(missing)}",
            "call llavar_peft.models.llama_tokenizer.add_image_tokens on it",
        )
    backend = tokenizer.backend_tokenizer
    bare = Tokenizer(backend.model)
    bare.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        bare.pre_tokenizer = backend.pre_tokenizer
    start, end = (vocabulary[name] if name in names else None for name in (IMAGE_START_TOKEN, IMAGE_END_TOKEN))
    return TextEncoder(
        pieces=bare,
        words=Words(Tokenizer(backend.model)) if _ends_with_words(bare) else None,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        patch=vocabulary[IMAGE_PATCH_TOKEN],
        start=start,
        end=end,
    )


def _ends_with_words(bare: Tokenizer) -> bool:
    """Whether no piece can come of two words, so that words can be encoded apart."""
    if bare.pre_tokenizer is not None or bare.normalizer is None or type(bare.model).__name__ != "BPE":
        return False
    form = json.loads(bare.normalizer.__getstate__())
    vocabulary = bare.get_vocab()
    return (
        form.get("normalizers") == _NORMALIZERS
        and _SPACE in vocabulary
        and not any(_ACROSS_WORDS.search(piece) for piece in vocabulary)
    )


def whole_characters(text: str) -> str:
    """Join surrogate pairs and replaces lone surrogates, which JSON can hold and UTF-8 cannot."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
