"""How closely an answer matches the truth, as shown during training. The metrics of the papers are in evaluation."""

from __future__ import annotations

from rapidfuzz.distance import Levenshtein


def exact_match(answer: str, truth: str) -> bool:
    """Return whether answer and truth are equal, except for the amount of white space."""
    return " ".join(answer.split()) == " ".join(truth.split())


def character_accuracy(answer: str, truth: str) -> float:
    """Return 1 minus the character error rate, at least 0. If the truth is empty, only an empty answer scores 1."""
    answer, truth = " ".join(answer.split()), " ".join(truth.split())
    if not truth:
        return float(not answer)
    return max(0.0, 1.0 - Levenshtein.distance(answer, truth) / len(truth))
