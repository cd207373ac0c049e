"""Encode text to ids without ever producing a special token, even if the text contains the name of one.

Each stretch of text between special tokens is encoded as the tokenizer itself would encode it in that place.

No token of LLaMA's vocabulary crosses a word boundary. Its words are therefore encoded separately and cached, which
gives the same ids as encoding whole texts and is faster.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from llavar_peft.constants import IMAGE_END_TOKEN, IMAGE_START_TOKEN
from llavar_peft.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from llavar_peft.types import Processor, TemplateName

_SPACE: Final = "▁"
_NORMALIZERS: Final = [
    {"type": "Prepend", "prepend": _SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
]
_WORD: Final = re.compile(f"{_SPACE}*[^{_SPACE}]+|{_SPACE}+")
_ACROSS_WORDS: Final = re.compile(f"[^{_SPACE}]{_SPACE}")
_CACHED_WORDS: Final = 2**15  # about 8 MB in every worker
_LONGEST_CACHED: Final = 32  # characters; longer words are rarely repeated


class WordCache:
    """Encodes words, each with the space before it, and caches their ids.

    Args:
        pieces: A tokenizer backend that does not normalize its text.
    """

    def __init__(self, pieces: Tokenizer) -> None:
        self._pieces = pieces
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Encode a text in which spaces are written as ``▁``."""
        ids: list[int] = []
        known = self._known
        for word in _WORD.findall(text):
            ids += known.get(word) or self._new(word)
        return ids

    def _new(self, word: str) -> list[int]:
        ids: list[int] = self._pieces.encode(word, add_special_tokens=False).ids
        if len(self._known) < _CACHED_WORDS and len(word) <= _LONGEST_CACHED:
            self._known[word] = ids
        return ids


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A tokenizer without its special tokens, and the ids of these.

    Attributes:
        pieces: The backend with the same vocabulary and merges, and without added tokens.
        later_pieces: The same for text after a special token, where some backends add no space before the first word.
        words: Encodes word by word; None for a vocabulary in which a token may cross a word boundary.
        bos: Id of the token that starts every text, ``<s>``; None if the conversation template writes it, or the
            language model has none.
        special: Ids of the special tokens, by their text.
        strips_before: Ids of the special tokens before which white space is not encoded.
        strips_after: Ids of the special tokens after which white space is not encoded.
        patch: Id of the image token, ``<im_patch>`` for LLaVAR.
        start: Id of ``<im_start>``, or None if it is not used.
        end: Id of ``<im_end>``, or None if it is not used.
    """

    pieces: Tokenizer
    later_pieces: Tokenizer
    words: WordCache | None
    bos: int | None
    special: Mapping[str, int]
    strips_before: frozenset[int]
    strips_after: frozenset[int]
    patch: int
    start: int | None
    end: int | None

    def encode(self, text: str, answer_start: int | None = None, *, first: bool = False) -> tuple[list[int], int]:
        """Encode a stretch of text between special tokens.

        Args:
            text: Any non-empty text without lone surrogates.
            answer_start: Index of the first supervised character.
            first: Whether no special token precedes it, apart from ``bos``.

        Returns:
            The ids, and the index of the first id with a supervised character (the number of ids if there is none).
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
        encoding = (self.pieces if first else self.later_pieces).encode(text, add_special_tokens=False)
        all_ids: list[int] = encoding.ids
        if supervised == len(text):
            return all_ids, len(all_ids)
        start = 0 if supervised == 0 else encoding.char_to_token(supervised)
        return all_ids, len(all_ids) if start is None else start

    def image_block(self, tokens: int) -> list[int]:
        """Return the ids of an image with ``tokens`` x ``<im_patch>``."""
        patches = [self.patch] * tokens
        return patches if self.start is None or self.end is None else [self.start, *patches, self.end]


def text_encoder(processor: Processor) -> TextEncoder:
    """Return the encoder of a processor's tokenizer, which is built once for each way to write images.

    Raises:
        ConfigError: The tokenizer is a slow one, or has no image tokens.
    """
    built = _ENCODERS.setdefault(processor.tokenizer, {})
    key = (processor.image_token, processor.use_im_start_end, processor.conversation_template.name)
    if key not in built:
        built[key] = _build(processor.tokenizer, *key)
    return built[key]


# The key is the tokenizer itself: a worker process gets a copy of it and builds its own encoder.
_ENCODERS: WeakKeyDictionary[Any, dict[tuple[Any, ...], TextEncoder]] = WeakKeyDictionary()


def _build(tokenizer: Any, image_token: str, use_im_start_end: bool, template: TemplateName) -> TextEncoder:
    from tokenizers import Tokenizer

    where = str(tokenizer.name_or_path or type(tokenizer).__name__)
    if not tokenizer.is_fast:
        raise ConfigError.at(
            where,
            "wrong kind of tokenizer (got a slow one, expected a fast one)",
            "load it with llavar_peft.models.llama_tokenizer.load_tokenizer",
        )
    vocabulary = tokenizer.get_vocab()
    names = (image_token, *((IMAGE_START_TOKEN, IMAGE_END_TOKEN) if use_im_start_end else ()))
    missing = [name for name in names if name not in vocabulary]
    if missing:
        raise ConfigError.at(
            where,
            f"the tokenizer has no image tokens (missing: {', '.join(missing)})",
            "call llavar_peft.models.llama_tokenizer.add_image_tokens on it",
        )
    ends = {"eos_token": tokenizer.eos_token_id}
    if template == "llava_v1":  # other language models may have none, as Qwen
        ends = {"bos_token": tokenizer.bos_token_id, **ends}
    unknown = [name for name, index in ends.items() if not isinstance(index, int)]
    if unknown:
        raise ConfigError.at(
            where,
            f"the tokenizer has no {' and no '.join(unknown)}",
            "copy the model's own tokenizer.json and tokenizer_config.json into its folder",
        )
    backend = tokenizer.backend_tokenizer
    bare = Tokenizer(backend.model)
    bare.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        bare.pre_tokenizer = backend.pre_tokenizer
    start, end = (vocabulary[name] if name in names else None for name in (IMAGE_START_TOKEN, IMAGE_END_TOKEN))
    added = tokenizer.added_tokens_decoder
    return TextEncoder(
        pieces=bare,
        later_pieces=_without_first_space(bare),
        words=WordCache(Tokenizer(backend.model)) if _respects_word_boundaries(bare) else None,
        bos=None if template == "chat" else tokenizer.bos_token_id,
        special={token.content: index for index, token in added.items()},
        strips_before=frozenset(index for index, token in added.items() if token.lstrip),
        strips_after=frozenset(index for index, token in added.items() if token.rstrip),
        patch=vocabulary[image_token],
        start=start,
        end=end,
    )


def _without_first_space(bare: Tokenizer) -> Tokenizer:
    """Return the backend for text that does not start the input: some add a space before its first word only."""
    if bare.pre_tokenizer is None:
        return bare
    form = json.loads(bare.pre_tokenizer.__getstate__())
    first_only = [step for step in form.get("pretokenizers", [form]) if step.get("prepend_scheme") == "first"]
    if not first_only:
        return bare
    for step in first_only:
        step["prepend_scheme"] = "never"
    changed = copy.deepcopy(bare.pre_tokenizer)
    changed.__setstate__(json.dumps(form).encode())
    later = type(bare)(bare.model)
    if bare.normalizer is not None:
        later.normalizer = bare.normalizer
    later.pre_tokenizer = changed
    return later


def _respects_word_boundaries(bare: Tokenizer) -> bool:
    """Return whether no token crosses a word boundary, so that words can be encoded separately."""
    if bare.pre_tokenizer is not None or bare.normalizer is None or type(bare.model).__name__ != "BPE":
        return False
    form = json.loads(bare.normalizer.__getstate__())
    vocabulary = bare.get_vocab()
    return (
        form.get("normalizers") == _NORMALIZERS
        and _SPACE in vocabulary
        and not any(_ACROSS_WORDS.search(piece) for piece in vocabulary)
    )


def valid_unicode(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates, which JSON can contain and UTF-8 cannot."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
