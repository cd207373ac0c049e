"""Convert tokens to text as they come, without splitting characters or revealing the beginning of a stop text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Final

_INCOMPLETE: Final = "\ufffd"  # what decoding gives for the beginning of a character
_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")


class TextStream:
    """The text of a growing answer.

    The joined pieces equal the tokenizer's decoding of all tokens, up to a stop text, stripped of white space. A run of
    byte tokens (LLaMA's fallback for characters without a token) is decoded when it ends: the tokenizer decodes such a
    run as a whole or not at all. Tokens of byte-level tokenizers that end within a character wait for its end.

    Args:
        tokenizer: The model's tokenizer.
        stop: Texts that end the answer.

    Attributes:
        text: The text returned so far.
        stopped: Whether a stop text was found.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._window = _Window(tokenizer)
        self._skipped, self._bytes = _special_ids(tokenizer), _byte_ids(tokenizer)
        self._stop = stop
        self._new: list[int] = []
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Add a token and return the text that has become final, which is often empty."""
        if self.stopped or token in self._skipped:
            return ""
        self._new.append(token)
        if token in self._bytes:
            return ""
        if (text := self._window.decode(self._new)).endswith(_INCOMPLETE):
            return ""
        self._held += text
        self._window.advance(self._new)
        self._new = []
        return self._release(last=False)

    def close(self) -> str:
        """End the answer and return the text that was held back."""
        if not self.stopped:
            self._held += self._window.decode(self._new)
            self._new = []
        return self._release(last=True)

    def _release(self, *, last: bool) -> str:
        found = [place for place in (self._held.find(stop) for stop in self._stop) if place >= 0]
        if found and not self.stopped:
            self._held, self.stopped = self._held[: min(found)], True
        keep = 0 if last or self.stopped else max((_overlap(self._held, stop) for stop in self._stop), default=0)
        ready = self._held[: len(self._held) - keep]
        if not self.text:
            ready = ready.lstrip()
        piece = ready.rstrip()
        self._held = "" if last or self.stopped else self._held[len(self._held) - keep - (len(ready) - len(piece)) :]
        self.text += piece
        return piece


class _Window:
    """Decode in windows: the text of a token can depend on the token before it, not on earlier ones."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []

    def decode(self, new: list[int]) -> str:
        """Return what these tokens add to the text."""
        before: str = self._tokenizer.decode(self._before, skip_special_tokens=True)
        both: str = self._tokenizer.decode(self._before + new, skip_special_tokens=True)
        return both[len(before) :]

    def advance(self, new: list[int]) -> None:
        """Continue after tokens, which stay at the beginning of the next window.

        The leading space is then stripped only once.
        """
        self._before = list(new) or self._before


def bytes_of_tokens(tokenizer: Any, ids: Sequence[int], text: str) -> list[bytes]:
    """Return the part of an answer's text that each token stands for.

    Args:
        tokenizer: The model's tokenizer.
        ids: All tokens of the answer.
        text: The text that ``TextStream`` made of them.

    Returns:
        UTF-8 of each token; joined, they are the text. Empty for special tokens, stripped white space and a stop text;
        part of a character for a token that is one byte of several.
    """
    raw = _raw_bytes(tokenizer, ids)
    whole = b"".join(raw).decode()
    start = len(whole[: len(whole) - len(whole.lstrip())].encode())
    end = start + len(text.encode())
    before = [0, *accumulate(len(part) for part in raw)]
    return [part[max(0, start - at) : max(0, end - at)] for at, part in zip(before, raw, strict=False)]


def _raw_bytes(tokenizer: Any, ids: Sequence[int]) -> list[bytes]:
    """Return what each token adds to the decoding of all tokens."""
    skipped, single, window = _special_ids(tokenizer), _byte_ids(tokenizer), _Window(tokenizer)
    parts: dict[int, bytes] = {}
    kept = [place for place, token in enumerate(ids) if token not in skipped]
    run: list[int] = []
    for place, following in zip(kept, [*kept[1:], None], strict=False):
        run.append(place)
        tokens = [ids[one] for one in run]
        text = window.decode(tokens)
        joined = ids[place] in single and following is not None and ids[following] in single
        if joined or (text.endswith(_INCOMPLETE) and ids[place] not in single and following is not None):
            continue
        window.advance(tokens)
        parts.update(zip(run, _split_bytes(text.encode(), len(run)), strict=True))
        run = []
    return [parts.get(place, b"") for place in range(len(ids))]


def _split_bytes(text: bytes, count: int) -> Iterator[bytes]:
    """Split the text of a run: one byte per token, or one replacement character if the run is not valid UTF-8."""
    size = max(1, len(text) // count)
    # Counted from the end, since the tokenizer strips a leading space.
    bounds = [0, *(max(0, len(text) - size * left) for left in range(count - 1, -1, -1))]
    return (text[start:end] for start, end in pairwise(bounds))


def _overlap(text: str, stop: str) -> int:
    """Return the number of characters at the end of the text that may be the beginning of a stop text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@lru_cache(maxsize=8)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    # ``all_special_ids`` lacks the image tokens, which decoding skips as well.
    return frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)


@lru_cache(maxsize=8)
def _byte_ids(tokenizer: Any) -> frozenset[int]:
    return frozenset(index for piece, index in tokenizer.get_vocab().items() if _BYTE.fullmatch(piece))
