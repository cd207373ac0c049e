"""Tokens to text as they come: never half a character, never the beginning of a stop text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, groupby, pairwise
from typing import Any, Final

_BYTE: Final = re.compile(r"<0x[0-9A-F]{2}>")


class TextStream:
    """The text of a growing answer.

    All pieces joined are the tokenizer's own decoding of all tokens, up to a stop text, without white space at the
    ends. A run of bytes (how LLaMA spells characters that it has no piece for) counts once it has ended: the tokenizer
    decodes such a run as a whole or not at all.

    Args:
        tokenizer: The model's.
        stop: Texts that end the answer.

    Attributes:
        text: What has been given out so far.
        stopped: Whether a stop text came.
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
        """Take a token.

        Args:
            token: Its id.

        Returns:
            The text that is certain now and was not before; often none.
        """
        if self.stopped or token in self._skipped:
            return ""
        self._new.append(token)
        if token in self._bytes:
            return ""
        self._held += self._decode_new()
        return self._give_out(last=False)

    def close(self) -> str:
        """End the answer.

        Returns:
            The text that was held back.
        """
        if not self.stopped:
            self._held += self._decode_new()
        return self._give_out(last=True)

    def _decode_new(self) -> str:
        new, self._new = self._new, []
        return self._window.decode(new)

    def _give_out(self, *, last: bool) -> str:
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
    """Decodes by windows: a token's text can depend on the one before it, not on those before that."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []

    def decode(self, new: list[int]) -> str:
        """What these tokens add to the text of those before."""
        before: str = self._tokenizer.decode(self._before, skip_special_tokens=True)
        whole: str = self._tokenizer.decode(self._before + new, skip_special_tokens=True)
        # What was read stays as the next window's beginning, so that the first space is stripped only once.
        self._before = new or self._before
        return whole[len(before) :]


def bytes_of_tokens(tokenizer: Any, ids: Sequence[int], text: str) -> list[bytes]:
    """What each token has in an answer's text.

    Args:
        tokenizer: The model's.
        ids: All tokens of the answer.
        text: What ``TextStream`` made of them.

    Returns:
        UTF-8 for each token, which together is the text: nothing of special tokens, of white space at the text's ends
        and of a stop text, and a part of a character of a token that is one byte of several.
    """
    raw = _raw_bytes(tokenizer, ids)
    whole = b"".join(raw).decode()
    start = len(whole[: len(whole) - len(whole.lstrip())].encode())
    end = start + len(text.encode())
    before = [0, *accumulate(len(part) for part in raw)]
    return [part[max(0, start - at) : max(0, end - at)] for at, part in zip(before, raw, strict=False)]


def _raw_bytes(tokenizer: Any, ids: Sequence[int]) -> list[bytes]:
    """What each token has in the decoding of all."""
    skipped, single, window = _special_ids(tokenizer), _byte_ids(tokenizer), _Window(tokenizer)
    parts: dict[int, bytes] = {}
    kept = [place for place, token in enumerate(ids) if token not in skipped]
    for is_byte, group in groupby(kept, key=lambda place: ids[place] in single):
        places = list(group)
        for run in [places] if is_byte else [[place] for place in places]:
            text = window.decode([ids[place] for place in run]).encode()
            parts.update(zip(run, _shared(text, len(run)), strict=True))
    return [parts.get(place, b"") for place in range(len(ids))]


def _shared(text: bytes, count: int) -> Iterator[bytes]:
    """A run's text among its tokens: a byte each, or, of a run that is no UTF-8, a replacement character each."""
    size = max(1, len(text) // count)
    # From the end: the decoding has no space at its beginning.
    bounds = [0, *(max(0, len(text) - size * left) for left in range(count - 1, -1, -1))]
    return (text[start:end] for start, end in pairwise(bounds))


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters may be the beginning of a stop text."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


@lru_cache(maxsize=8)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    # Not ``all_special_ids``, which leaves out the image tokens; decoding skips those too.
    return frozenset(index for index, token in tokenizer.added_tokens_decoder.items() if token.special)


@lru_cache(maxsize=8)
def _byte_ids(tokenizer: Any) -> frozenset[int]:
    return frozenset(index for piece, index in tokenizer.get_vocab().items() if _BYTE.fullmatch(piece))
