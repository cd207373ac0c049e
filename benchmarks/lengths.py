"""Lengths of the benchmarks' random records, like those of LLaVAR's training data, which is not shipped.

Means are computed from the published files' sizes (LLaVA, docs/Data.md: ``conversation_58k.json`` 126 MB,
``detail_23k.json`` 20.5 MB, ``complex_reasoning_77k.json`` 79.6 MB, ``chat.json`` of 595K captions 211 MB; LLaVAR:
``chat_llavar.json`` of 1,017K records 389 MB) less the JSON syntax around each text, at 4.4 characters a token (3.2
in OCR). The spread of stage 2 was measured on GPT-4's answers to LLaVA's 90 COCO questions: standard deviation of the
logarithm 0.50, 0.25 and 0.23. The number of questions in a conversation (3 to 6) and the spread of stage 1 are
assumptions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

TEMPLATE_TOKENS = 66
"""``<s>`` and the system text, by LLaMA's tokenizer."""
TURN_TOKENS = 9
"""``USER:``, `` ASSISTANT:`` and the spaces around a question and its answer, without ``</s>``."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of record.

    Attributes:
        share: Share of all records.
        pairs: Smallest and largest number of questions.
        question: Mean number of tokens of a question.
        answer: Mean number of tokens of an answer.
        spread: Standard deviation of the logarithm of an answer's number of tokens.
    """

    share: float
    pairs: tuple[int, int]
    question: int
    answer: int
    spread: float


KINDS = {
    "stage1": (Kind(595 / 1017, (1, 1), 14, 16, 0.4), Kind(422 / 1017, (1, 1), 13, 44, 0.9)),
    "stage2": (
        Kind(58 / 158, (3, 6), 11, 68, 0.50),
        Kind(23 / 158, (1, 1), 10, 140, 0.25),
        Kind(77 / 158, (1, 1), 16, 170, 0.23),
    ),
}
"""Captions and OCR; conversations, descriptions and answers to complex questions."""


def draw_turns(stage: str, count: int, seed: int) -> list[tuple[tuple[int, int], ...]]:
    """Draw the lengths of records.

    Args:
        stage: ``"stage1"`` or ``"stage2"``.
        count: Number of records.
        seed: Seed of the random numbers.

    Returns:
        For each record, the numbers of tokens (question, answer) of each of its pairs.
    """
    draw = Random(seed)
    kinds = KINDS[stage]
    chosen: Sequence[Kind] = draw.choices(kinds, weights=[kind.share for kind in kinds], k=count)
    return [tuple((kind.question, _answer(draw, kind)) for _ in range(draw.randint(*kind.pairs))) for kind in chosen]


def _answer(draw: Random, kind: Kind) -> int:
    # The mean of a log-normal distribution exceeds its median by a factor of exp(variance / 2).
    return max(2, round(draw.lognormvariate(math.log(kind.answer) - kind.spread**2 / 2, kind.spread)))


def about(stage: str) -> str:
    """Describe the lengths of a stage's records in one line."""
    drawn = draw_turns(stage, 4096, 0)
    lengths = sorted(
        TEMPLATE_TOKENS + sum(TURN_TOKENS + question + answer for question, answer in one) for one in drawn
    )
    low, middle, high = (lengths[int(part * len(lengths))] for part in (0.05, 0.5, 0.95))
    return f"{stage}: {low} / {middle} / {high} tokens of text (5 %, median, 95 %), in addition to the image's"
