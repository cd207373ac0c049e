"""How closely an answer matches the truth, as shown during training. The metrics of the papers are in evaluation."""

from __future__ import annotations

import unicodedata
from typing import Final

from rapidfuzz.distance import Levenshtein

# Zero-width space, word joiner, byte order mark and soft hyphen have no shape, so no image shows them. The joiners
# U+200C and U+200D are kept, because they change how the letters beside them look.
_SHAPELESS: Final = dict.fromkeys(map(ord, "\u200b\u2060\ufeff\u00ad"))


def unify_text(text: str) -> str:
    """Return a text with composed letters (NFC), single spaces, and without characters that have no shape.

    Two texts that look the same then are the same. Letters that look different stay different: full-width letters,
    ligatures, superscripts, and upper and lower case.
    """
    return " ".join(unicodedata.normalize("NFC", text.translate(_SHAPELESS)).split())


def is_blank(text: str) -> bool:
    """Return whether a text has only white space, control characters and characters without a shape."""
    return all(letter.isspace() or unicodedata.category(letter) in ("Cc", "Cf") for letter in text)


def exact_match(answer: str, truth: str) -> bool:
    """Return whether answer and truth are equal after ``unify_text``. Nothing matches a blank truth."""
    return not is_blank(truth) and unify_text(answer) == unify_text(truth)


def character_accuracy(answer: str, truth: str) -> float:
    """Return 1 minus the character error rate, at least 0; 0 for a blank truth."""
    answer, truth = unify_text(answer), unify_text(truth)
    return 0.0 if is_blank(truth) else max(0.0, 1.0 - Levenshtein.distance(answer, truth) / len(truth))
