"""How well an answer was read, for the eyes of someone training. The papers' protocols are in evaluation."""

from __future__ import annotations

from rapidfuzz.distance import Levenshtein


def exact_match(answer: str, truth: str) -> bool:
    """Whether the answer is the truth, but for white space at the ends and runs of it inside."""
    return " ".join(answer.split()) == " ".join(truth.split())


def character_accuracy(answer: str, truth: str) -> float:
    """1 minus the character error rate, not below 0.

    Args:
        answer: What was read.
        truth: What is written.

    Returns:
        1.0 for the truth itself; 1.0 too where both are empty.
    """
    answer, truth = " ".join(answer.split()), " ".join(truth.split())
    if not truth:
        return float(not answer)
    return max(0.0, 1.0 - Levenshtein.distance(answer, truth) / len(truth))
