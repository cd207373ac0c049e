"""SentencePiece's algorithm as llama.cpp runs it: neighboring pieces are joined by the score of what they form.

A fast tokenizer instead joins pairs in the order of its list of merges. The two agree if the scores are built from that
list; this class shows whether they do, without llama.cpp.

Source of the algorithm: Kudo and Richardson, arXiv 1808.06226, section 3.1; llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Final

SPACE: Final = "▁"
BYTE_PIECES: Final = tuple(f"<0x{byte:02X}>" for byte in range(256))


class ScoreTokenizer:
    """Encodes text by the scores of pieces.

    Args:
        pieces: All pieces, by id; among them one for each byte.
        scores: Their scores; the pair that forms the piece with the highest score is joined first.
    """

    def __init__(self, pieces: Sequence[str], scores: Sequence[float]) -> None:
        self._ids = {piece: index for index, piece in enumerate(pieces)}
        self._scores = scores
        self._bytes = [self._ids[piece] for piece in BYTE_PIECES]

    def encode(self, text: str) -> list[int]:
        """Encode a stretch of text between special tokens, with a space before its first word."""
        symbols: list[str] = list(SPACE + text.replace(" ", SPACE))
        after, before = list(range(1, len(symbols) + 1)), list(range(-1, len(symbols) - 1))
        queue: list[tuple[float, int, int, int]] = []
        origins: dict[str, tuple[str, str]] = {}

        def offer(left: int, right: int) -> None:
            if left < 0 or right >= len(symbols):
                return
            joined = symbols[left] + symbols[right]
            if joined in self._ids:
                heapq.heappush(queue, (-self._scores[self._ids[joined]], left, right, len(joined)))
                origins[joined] = (symbols[left], symbols[right])

        for left in range(len(symbols) - 1):
            offer(left, left + 1)
        while queue:
            _, left, right, length = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != length:
                continue  # one of them is part of a longer piece by now
            symbols[left] += symbols[right]
            symbols[right] = ""
            after[left] = after[right]
            if after[right] < len(symbols):
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [index for symbol in symbols if symbol for index in self._pieces_of(symbol, origins)]

    def _pieces_of(self, symbol: str, origins: dict[str, tuple[str, str]]) -> list[int]:
        if symbol in self._ids:
            return [self._ids[symbol]]
        if symbol in origins:
            return [index for part in origins[symbol] for index in self._pieces_of(part, origins)]
        return [self._bytes[byte] for byte in symbol.encode("utf-8", "surrogatepass")]
