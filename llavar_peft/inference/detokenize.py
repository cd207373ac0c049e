"""Tokens to text as they come: never half a character, never the beginning of a stop text."""

from __future__ import annotations

import re
from functools import lru_cache
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
        self._tokenizer = tokenizer
        self._skipped, self._bytes = _special_ids(tokenizer), _byte_ids(tokenizer)
        self._stop = stop
        # Decoding goes by windows: a token's text can depend on the one before it, not on those before that.
        self._ids: list[int] = []
        self._read = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Takes a token.

        Args:
            token: Its id.

        Returns:
            The text that is certain now and was not before; often none.
        """
        if self.stopped or token in self._skipped:
            return ""
        self._ids.append(token)
        if token in self._bytes:
            return ""
        self._held += self._decode_new()
        return self._give_out(last=False)

    def close(self) -> str:
        """Ends the answer.

        Returns:
            The text that was held back.
        """
        if not self.stopped:
            self._held += self._decode_new()
        return self._give_out(last=True)

    def _decode_new(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._read], skip_special_tokens=True)
        whole: str = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        # What was read stays as the next window's beginning, so that its first space is stripped only once.
        self._ids = self._ids[self._read :] or self._ids
        self._read = len(self._ids)
        return whole[len(before) :]

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
