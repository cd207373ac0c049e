"""An account of a build: what was kept, and why the rest was not."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from llavar_peft.datagen.ocr.quality_filter import Reason

_WHY: dict[Reason, str] = {
    "broken_image": "cannot be opened",
    "engine_failed": "the engine failed on it",
    "blank_page": "nothing is on it",
    "no_text": "no text seen",
    "low_confidence": "half of its letters are uncertain",
    "few_letters": "too few letters",
    "other_script": "in another script",
    "reserved_text": "says <image>, which marks a picture's place",
    "engines_disagree": "the two engines read it differently",
    "duplicate": "a copy of another picture",
}


@dataclass(frozen=True, slots=True)
class Drop:
    """An image that became no record.

    Attributes:
        path: The image.
        reason: Why, for programs.
        detail: Why, for people.
    """

    path: str
    reason: Reason
    detail: str


@dataclass
class BuildReport:
    """What a build did.

    Attributes:
        folder: Of the images.
        records: The file written.
        reading: The engines with their versions, and the short edge.
        images: Images found.
        resumed: How many of them had been read before.
        other_files: Files that are no images by their names.
        kept: Records written.
        lines: Lines that were good enough, of images kept or not.
        lines_left_out: Lines that were not.
        letters: Letters and digits in the records.
        scripts: Letters in the records by script.
        drops: Images left out, by path.
        seconds: How long this run took.
    """

    folder: str
    records: str
    reading: dict[str, Any]
    images: int
    resumed: int
    other_files: int
    kept: int = 0
    lines: int = 0
    lines_left_out: int = 0
    letters: int = 0
    scripts: Counter[str] = field(default_factory=Counter)
    drops: list[Drop] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def counts(self) -> dict[Reason, int]:
        """Images left out by reason, most frequent first."""
        return dict(Counter(drop.reason for drop in self.drops).most_common())

    def as_dict(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return {
            **asdict(self),
            "seconds": round(self.seconds, 1),
            "scripts": dict(self.scripts.most_common()),
            "dropped": self.counts,
        }

    def table(self) -> str:
        """The account as lines of text."""
        engines = ", ".join(f"{name} {version}" for name, version in self.reading["engines"].items())
        scale = f"short edge {self.reading['short_edge']}" if self.reading["short_edge"] else "full size"
        rows = [("pictures", self.images, f"{self.resumed} read before; {engines}, {scale}")]
        rows.append(("records", self.kept, f"{self.letters} letters ({_shares(self.scripts)})"))
        rows += [(f"  {reason}", count, _WHY[reason]) for reason, count in self.counts.items()]
        rows.append(("lines", self.lines, f"{self.lines_left_out} more were too uncertain"))
        return "\n".join(f"{what:<20} {count:>8}  {why}" for what, count, why in rows)


def _shares(scripts: Counter[str]) -> str:
    total = sum(scripts.values())
    return ", ".join(f"{script} {count / total:.0%}" for script, count in scripts.most_common(3)) or "none"
