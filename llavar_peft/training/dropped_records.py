"""Records that cannot be trained on: count and name them, and stop the run above a share."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from llavar_peft.errors import DataError
from llavar_peft.recipe.schema import DataConfig
from llavar_peft.training.run_files import append_line, read_metric_lines

logger = logging.getLogger(__name__)

DROPPED_FILE = "dropped.jsonl"
_SHOWN = 20
_FIX = re.compile(r"\. (?:Fix|Mend):")  # version 0.1 wrote "Mend"


class DroppedRecords:
    """Counts each record once, over all epochs and restarts.

    Args:
        path: The stage's ``dropped.jsonl``; its existing lines count.
        data: The policy: ``on_bad_image`` and ``max_bad_share``.
        total: Number of records trained on.
        ranks: Number of processes that share the records. Each counts its own part against its share of the limit.
    """

    def __init__(self, path: Path, data: DataConfig, *, total: int, ranks: int = 1) -> None:
        self.path = path
        self.data = data
        self.allowed = int(data.max_bad_share * total) / max(ranks, 1)
        self.total = total
        self.reasons: dict[str, str] = {str(line["id"]): str(line["reason"]) for line in read_metric_lines(path)}

    def add(self, faults: Iterable[tuple[str, str]]) -> None:
        """Add a batch's faults.

        Args:
            faults: Pairs of record id and reason; the kind of the reason precedes its first colon.

        Raises:
            DataError: An image is bad and the policy is ``stop``, or more records are dropped than the share allows.
        """
        for record, reason in faults:
            # The policy applies to records known from an earlier run as well.
            if reason.startswith("image:") and self.data.on_bad_image == "stop":
                raise DataError.at(
                    f"record {record}",
                    _FIX.split(reason.removeprefix("image:").strip())[0],
                    "repair the image, or set data.on_bad_image to skip",
                )
            if record not in self.reasons:
                self.reasons[record] = reason
                append_line(self.path, {"id": record, "reason": reason})
            if len(self.reasons) > self.allowed:
                raise self._too_many()

    def _too_many(self) -> DataError:
        kinds = Counter(_FIX.split(reason)[0].split(" (")[0][:80] for reason in self.reasons.values())
        ids = ", ".join(list(self.reasons)[:_SHOWN])
        more = f", and {len(self.reasons) - _SHOWN} more" if len(self.reasons) > _SHOWN else ""
        counted = "; ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        error = DataError.at(
            str(self.path),
            f"{len(self.reasons)} of {self.total} records cannot be trained on, more than the share of "
            f"{self.data.max_bad_share:.2%}: {counted}. Records {ids}{more}",
            "check them with 'llavar-peft data check', raise max_length, or raise data.max_bad_share",
        )
        return DataError(str(error), error.faults)
