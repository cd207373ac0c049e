"""A fast tokenizer as the vocabulary of a GGUF file.

llama.cpp has two tokenizers for these language models. ``llama`` joins pieces by scores, which a ``tokenizer.json``
does not have: they are rebuilt from its list of merges, so that both join the same pairs in the same order. ``gpt2``
reads the merges themselves, and knows the splitting of text into words by a name.

Source of the format: ggml, docs/gguf.md; llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from llavar_peft.errors import ConfigError
from llavar_peft.weights.gguf.gguf_tensors import OTHER_LAYOUT
from llavar_peft.weights.gguf.score_tokenizer import BYTE_PIECES, SPACE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens in ``tokenizer.ggml.token_type``."""

_SPACED: Final = [
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
]
_NEVER: Final = -1e9
"""Score of a piece that no two others are merged into."""
_CONTRACTIONS: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD_PATTERNS: Final = {
    (_CONTRACTIONS + r"\p{N}" + _REST, False): "qwen2",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
}
"""llama.cpp's name of a pattern of words, and whether it takes a word that is a token without merging."""
_GPT_2: Final = "gpt-2"
"""llama.cpp's name of the splitting that is built into byte-level tokenizers."""


@dataclass(frozen=True, slots=True)
class GgufVocabulary:
    """The tokens of a GGUF file.

    Attributes:
        model: llama.cpp's tokenizer.
        pre: Name of the splitting of text into words.
        tokens: One for each row of the embeddings.
        kinds: Of each token.
        scores: Of each token; empty for ``gpt2``.
        merges: For ``gpt2``: pairs, joined by a space.
    """

    model: Literal["llama", "gpt2"]
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()


def read_vocabulary(described: Mapping[str, Any], rows: int, where: str) -> GgufVocabulary:
    """Convert a tokenizer.

    Args:
        described: The contents of its ``tokenizer.json``.
        rows: Number of rows of the embeddings. Rows without a token get one that no text becomes.
        where: The model, for messages.

    Raises:
        ConfigError: llama.cpp would split text in another way.
    """
    model = described["model"]
    if model.get("type") != "BPE":
        raise _unknown(where, f"its model is {model.get('type')!r}, expected BPE")
    vocabulary: dict[str, int] = model["vocab"]
    added: list[dict[str, Any]] = described.get("added_tokens") or []
    names = {index: token for token, index in vocabulary.items()}
    names |= {int(one["id"]): str(one["content"]) for one in added}
    tokens = tuple(names.get(index, f"[UNUSED_ROW_{index}]") for index in range(rows))
    if len(set(tokens)) != rows:
        raise _unknown(where, "two of its tokens have the same text")
    kinds = [NORMAL if index in names else UNUSED for index in range(rows)]
    for one in added:
        kinds[one["id"]] = CONTROL if one["special"] else USER_DEFINED
    if not model.get("byte_fallback"):
        return _word_vocabulary(described, tokens, kinds, where)
    _check_spaced(described, vocabulary, where)
    for index, token in enumerate(tokens):
        if token in BYTE_PIECES:
            kinds[index] = BYTE
        elif token == model.get("unk_token"):
            kinds[index] = UNKNOWN
    ranks: dict[str, int] = {}
    for left, right in map(_pair, model["merges"]):
        ranks.setdefault(left + right, len(ranks))
    scores = tuple(-float(ranks[token]) if token in ranks else _NEVER for token in tokens)
    return GgufVocabulary("llama", "default", tokens, tuple(kinds), scores)


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _check_spaced(described: Mapping[str, Any], vocabulary: Mapping[str, int], where: str) -> None:
    """Reject a tokenizer of pieces that llama.cpp would not split in the same way."""
    normalizer = described.get("normalizer") or {}
    if normalizer.get("type") != "Sequence" or normalizer.get("normalizers") != _SPACED:
        raise _unknown(where, f"its normalizer does not write {SPACE} before each stretch of text and for each space")
    if described.get("pre_tokenizer") is not None:
        raise _unknown(where, "it has a pre-tokenizer")
    missing = [piece for piece in BYTE_PIECES if piece not in vocabulary]
    if missing:
        raise _unknown(where, f"llama.cpp stops at unknown characters without pieces for all bytes (no {missing[0]})")


def _word_vocabulary(
    described: Mapping[str, Any], tokens: tuple[str, ...], kinds: list[int], where: str
) -> GgufVocabulary:
    model, before = described["model"], described.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers") or [before]
    known = None
    if [step.get("type") for step in steps] == ["Split", "ByteLevel"]:
        split, encode = steps
        plain = split["behavior"] == "Isolated" and not split["invert"]
        if plain and not encode["add_prefix_space"] and not encode["use_regex"]:
            known = _WORD_PATTERNS.get((split["pattern"].get("Regex"), bool(model.get("ignore_merges"))))
    elif [step.get("type") for step in steps] == ["ByteLevel"] and not model.get("ignore_merges"):
        known = _GPT_2 if steps[0]["use_regex"] and not steps[0]["add_prefix_space"] else None
    if known is None or (described.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        raise _unknown(where, "it splits text into words in a way that has no name there")
    pairs = tuple(" ".join(_pair(merge)) for merge in model["merges"])
    return GgufVocabulary("gpt2", known, tokens, tuple(kinds), merges=pairs)


def _unknown(where: str, what: str) -> ConfigError:
    names = ", ".join((*_WORD_PATTERNS.values(), _GPT_2))
    error = ConfigError.at(
        where, f"llama.cpp does not have this tokenizer: {what} (expected LLaMA's, or that of {names})", OTHER_LAYOUT
    )
    return ConfigError(str(error), error.faults)
