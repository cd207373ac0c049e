"""What a check of the records found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from llavar_peft.errors import Fault

Kind = Literal[
    "record",
    "placeholder",
    "no_answer",
    "empty_answer",
    "last_turn",
    "no_image_folder",
    "image_missing",
    "image_outside",
    "image_broken",
    "duplicate_id",
]
"""``duplicate_id`` is a warning (LLaVA-Instruct has many); all others are faults."""


@dataclass(frozen=True, slots=True)
class RecordFinding(Fault):
    """A fault with its kind.

    Attributes:
        kind: What sort of fault, for counting.
        index: Of the record in the store.
    """

    kind: Kind
    index: int


@dataclass(frozen=True)
class RecordReport(Sequence[RecordFinding]):
    """What ``check_records`` found; as a sequence, its faults.

    Attributes:
        records: Number of records looked at.
        images_opened: Number of images that could be opened, each once.
        faults: What must be mended, in the records' order.
        warnings: What may be meant.
    """

    records: int
    images_opened: int
    faults: tuple[RecordFinding, ...]
    warnings: tuple[RecordFinding, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.faults)

    def __getitem__(self, index: Any) -> Any:
        """A fault."""
        return self.faults[index]

    @property
    def clean(self) -> bool:
        """Whether nothing has to be mended."""
        return not self.faults

    @property
    def counts(self) -> dict[str, int]:
        """Number of faults and warnings of each kind, most frequent first."""
        return dict(Counter(finding.kind for finding in (*self.faults, *self.warnings)).most_common())

    def as_dict(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return {
            "records": self.records,
            "images_opened": self.images_opened,
            "clean": self.clean,
            "counts": self.counts,
            "faults": [asdict(finding) for finding in self.faults],
            "warnings": [asdict(finding) for finding in self.warnings],
        }
