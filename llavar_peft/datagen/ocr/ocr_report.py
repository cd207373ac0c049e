"""Report of a build: what was kept, and why the rest was dropped."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from llavar_peft.datagen.ocr.ocr_quality import Reason
from llavar_peft.datagen.ocr.reading_agreement import HIGH_RATE, Agreement
from llavar_peft.errors import count_of

OWN_TEXT = "own text"
_EXPLANATIONS: dict[Reason, str] = {
    "pages_left_out": "PDF documents with more pages than --max-pages",
    "broken_image": "cannot be opened",
    "engine_failed": "the engine failed",
    "blank_page": "the image is blank",
    "no_text": "no text was found",
    "low_confidence": "half of the letters are uncertain",
    "few_letters": "too few letters",
    "other_script": "in another script",
    "reserved_text": "contains <image>, which marks the position of an image",
    "engines_disagree": "the two engines disagree",
    "duplicate": "a copy of another image",
}


@dataclass(frozen=True, slots=True)
class Drop:
    """An image that was dropped, with the reason for programs and a detail for people."""

    path: str
    reason: Reason
    detail: str


@dataclass
class BuildReport:
    """Report of a build.

    Attributes:
        records: The file written.
        reading: Engines with their versions, and the profile or the short edge.
        resumed: Number of images that an earlier run had read.
        other_files: Number of files whose names are not those of images.
        kept: Number of records written.
        lines: Number of confident lines, in images kept or not.
        lines_left_out: Number of lines below the minimum confidence.
        letters: Number of letters and digits in the records.
        scripts: Number of letters in the records by script.
        pages: Number of pages of PDF documents by where their text is from: ``""`` their own, else why they were read.
        profiles: Number of images by the profile with which they were read.
        agreement: The estimated character error rate of the images that are good enough.
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
    pages: Counter[str] = field(default_factory=Counter)
    profiles: Counter[str] = field(default_factory=Counter)
    agreement: Agreement = field(default_factory=Agreement)
    drops: list[Drop] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def counts(self) -> dict[Reason, int]:
        """Number of images dropped by reason, most frequent first."""
        return dict(Counter(drop.reason for drop in self.drops).most_common())

    def as_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-ready dictionary."""
        return {
            **asdict(self),
            "seconds": round(self.seconds, 1),
            "scripts": dict(self.scripts.most_common()),
            "pages": {why or OWN_TEXT: count for why, count in self.pages.most_common()},
            "profiles": dict(self.profiles.most_common()),
            "agreement": self.agreement.as_dict(),
            "uncertain": self.agreement.is_high,
            "dropped": self.counts,
        }

    def table(self) -> str:
        """Return the report as a table in plain text."""
        engines = ", ".join(f"{name} {version}" for name, version in self.reading["engines"].items())
        rows = [("images", self.images, f"{self.resumed} read by an earlier run; {engines}, {self._scale()}")]
        rows.append(("records", self.kept, f"{self.letters} letters ({_format_shares(self.scripts)})"))
        rows += [(f"  {reason}", count, _EXPLANATIONS[reason]) for reason, count in self.counts.items()]
        rows.append(("lines", self.lines, f"{self.lines_left_out} more were too uncertain"))
        table = [f"{name:<20} {count:>8}  {note}" for name, count, note in rows]
        if self.pages:
            read = ", ".join(f"{count} {why}" for why, count in self.pages.most_common() if why)
            note = f"{self.pages['']} by their {OWN_TEXT}" + (f"; read as images: {read}" if read else "")
            table.append(f"{'pages of PDFs':<20} {self.pages.total():>8}  {note}")
        agreement = self.agreement
        if agreement.rate is not None:
            note = f"characters wrong, estimated from {count_of(agreement.images, 'image')}: {agreement.method}"
            table.append(f"{'error rate':<20} {agreement.rate:>8.1%}  {note}")
        return "\n".join(table)

    def warning(self) -> str | None:
        """Return a warning with examples if the estimated error rate is high."""
        if not self.agreement.is_high:
            return None
        examples = [
            f"  {one.path} ({one.rate:.0%}): {one.first!r} or {one.second!r}" for one in self.agreement.examples
        ]
        heading = f"more than {HIGH_RATE:.0%} of the characters may be wrong; two readings of the same images:"
        fix = "Fix: look at the images; --min-confidence 0.8 or --both leave out what is uncertain"
        return "\n".join((heading, *examples, fix))

    def _scale(self) -> str:
        if "profile" in self.reading:
            read = ", ".join(f"{count} as {profile}" for profile, count in self.profiles.most_common()) or "none"
            return f"profile {self.reading['profile']} ({read})"
        return f"short edge {self.reading['short_edge']}" if self.reading["short_edge"] else "full size"


def _format_shares(scripts: Counter[str]) -> str:
    total = sum(scripts.values())
    return ", ".join(f"{script} {count / total:.0%}" for script, count in scripts.most_common(3)) or "none"
