"""An estimate of the character error rate of a build, from the agreement of two readings of the same images.

The second reading is the other engine's with ``--both``, and otherwise one of the same engine in another size, of a
sample of the images. Two engines err in different places, so that their disagreement is about the sum of both error
rates; two readings of one engine share some errors, so that theirs is a lower bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rapidfuzz.distance import Levenshtein

from llavar_peft.datagen.ocr.ocr_lines import OcrLine
from llavar_peft.datagen.ocr.ocr_quality import QualityLimits, confident, transcribe

HIGH_RATE: Final = 0.03
"""Estimated character error rate above which a build warns."""
EXAMPLES: Final = 5
"""Maximum number of images shown with a warning."""
_SAMPLE: Final = 10  # one image of so many is read twice
_LARGEST_SAMPLE: Final = 24
_SHOWN: Final = 60  # letters of an example


@dataclass(frozen=True, slots=True)
class Disagreement:
    """An image whose two readings differ, with its rate and the first place where they do."""

    path: str
    rate: float
    first: str
    second: str


@dataclass
class Agreement:
    """How far two readings of the same images agree.

    Attributes:
        method: What was compared.
        images: Number of images that were read twice.
        letters: Number of characters in the longer readings, without white space.
        edits: Number of characters that differ.
        examples: The images that differ most.
    """

    method: str = ""
    images: int = 0
    letters: int = 0
    edits: int = 0
    examples: list[Disagreement] = field(default_factory=list)

    @property
    def rate(self) -> float | None:
        """The estimated character error rate; None if nothing was read twice."""
        return self.edits / self.letters if self.letters else None

    @property
    def is_high(self) -> bool:
        """Whether the rate calls for a warning."""
        return (self.rate or 0.0) > HIGH_RATE

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as a JSON-ready dictionary."""
        rows = [{name: getattr(one, name) for name in one.__slots__} for one in self.examples]
        rate = None if self.rate is None else round(self.rate, 4)
        return {"error_rate": rate, "method": self.method, "images": self.images, "examples": rows}


def choose_second_readings(paths: Sequence[str], read_before: int) -> frozenset[str]:
    """Return the images to read twice, evenly spaced: at least one of a new folder, and at most a few.

    Args:
        paths: Images that will be read.
        read_before: Number of images that an earlier run has read.
    """
    most = min(_LARGEST_SAMPLE, -(-len(paths) // _SAMPLE))
    count = most if not read_before else min(most, len(paths) // _SAMPLE)
    return frozenset(paths[number * len(paths) // count] for number in range(count))


def compare_readings(
    agreement: Agreement, path: str, text: str, entry: Mapping[str, Any], limits: QualityLimits
) -> None:
    """Add an image's two readings, if it has two.

    Args:
        agreement: Is changed.
        text: The text of the first reading.
        entry: The journal's entry.
    """
    engines = list(entry["lines"])
    if entry.get("page") == "":  # the page's own text, which no engine read
        return
    if len(engines) > 1:
        agreement.method, lines = f"{engines[0]} and {engines[1]}", entry["lines"][engines[1]]
    elif "again" in entry:
        agreement.method, lines = f"{engines[0]} in two sizes", entry["again"]
    else:
        return
    first, second = "".join(text.split()), transcribe(confident(map(OcrLine.from_json, lines), limits))
    second = "".join(second.split())
    edits = Levenshtein.distance(first, second)
    agreement.images += 1
    agreement.letters += max(len(first), len(second))
    agreement.edits += edits
    if edits:
        place = max(0, next(op.src_pos for op in Levenshtein.editops(first, second)) - _SHOWN // 3)
        shown = first[place : place + _SHOWN], second[place : place + _SHOWN]
        agreement.examples.append(Disagreement(path, round(edits / max(len(first), len(second)), 4), *shown))
        agreement.examples.sort(key=lambda one: (-one.rate, one.path))
        del agreement.examples[EXAMPLES:]
