"""One line for each protocol: what a figure counts. ``docs/evaluation.md`` has the same names as anchors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_LINES: Final[Mapping[str, str]] = {
    "multimodalocr": "a truth occurs as whole words in the answer, both after VQA normalization; the paper's protocol",
    "substring": "a truth occurs anywhere in the answer, in any case, as in OCRBench",
    "vqa-accuracy": "min(agreeing annotators / 3, 1), averaged over leaving out each of ten annotators",
    "anls": "1 - normalized edit distance to the nearest truth, and 0 from a distance of 0.5",
    "exact": "the answer is a truth, except for the amount of white space",
    "cer": "wrong characters per character of the nearest truth",
    "wer": "wrong words per word of the nearest truth",
    "meteor": "METEOR 1.5 with equal words and stems, without synonyms and paraphrases",
    "rouge-l": "longest common sequence of words with a truth, as in the COCO caption evaluation",
    "cider": "CIDEr-D: words and phrases shared with the truths, rare ones weighing more; at most 1000 %",
    "long-correct": "of truths longer than ten characters, those that occur in the answer",
    "long-partial": "of truths longer than ten characters, those that occur with at most half of the characters wrong",
    "relaxed": "a number within 5 % of a truth, or the same text, as in ChartQA",
    "scienceqa": "the answer chooses the letter of the right option",
    "mme": "answers read as yes or no by MME's rule, the first four characters; a score is of 200",
    "mme-first-word": "answers read as yes or no by their first such word; a score is of 200",
    "fields F1": "2 x right / (answered + true) over all fields, after normalization",
    "fields right": "true fields that are right",
    "documents right": "documents in which all fields are right, without others",
    "valid JSON": "answers that are a JSON object or list",
    "CORD F1": "Donut's F1 over the texts of all fields",
    "CORD nTED": "Donut's accuracy by tree edit distance: 1 - distance / distance of an empty answer",
    "SROIE F1": "harmonic mean of SROIE's precision and recall, ICDAR 2019, task 3",
    "SROIE precision": "answered fields whose text is exactly the same",
    "SROIE recall": "true fields whose text is exactly the same",
    "field NAME": "documents in which this field is right, of those that have it",
    "field NAME F1": "2 x right / (answered + true) over the values of this field",
}
_FIELD: Final = re.compile(r"field .+?( F1)?")


def explain_protocol(name: str) -> str:
    """Return one line about the protocol of a figure; empty for one that is not known."""
    if name in _LINES:
        return _LINES[name]
    if found := _FIELD.fullmatch(name):
        return _LINES[f"field NAME{found[1] or ''}"]
    return _LINES.get(name.split(" ", maxsplit=1)[0], "")


def protocol_anchor(name: str) -> str:
    """Return the anchor of a protocol in ``docs/evaluation.md``."""
    return "protocol-" + re.sub(r"[^a-z0-9]+", "-", name.lower())


PROTOCOL_NAMES: Final = tuple(_LINES)
"""The protocols that have a line."""
