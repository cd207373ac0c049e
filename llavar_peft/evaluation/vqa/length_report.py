"""What records require of a model before it is trained on them: tokens per record, and the size of their text.

Tokens are those of the model's own processor. Letter heights come from the records (``text_height`` or ``box``, with
``image_width`` and ``image_height``), which ``synth`` and ``ocr build`` write, scaled to the tower's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from llavar_peft.constants import OCR_INSTRUCTIONS
from llavar_peft.data.encode_record import encode_conversation
from llavar_peft.data.record_store import parse_record
from llavar_peft.data.text_size import SMALLEST_LETTERS, read_text_size
from llavar_peft.errors import DataError
from llavar_peft.evaluation.vqa.diagnose_results import TooSmall, measure_letter_height
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion
from llavar_peft.types import ReadableRepr

if TYPE_CHECKING:
    from llavar_peft.data.image_roots import ImageRoots
    from llavar_peft.models.processing_llavar import LlavarProcessor

_MAX_RECORDS: Final = 20_000
"""Number of records to examine, evenly spread; more would take minutes and give the same shares."""
_SHARES: Final = (50, 90, 99, 100)
_NO_LIMIT: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class AnswerLengths:
    """Tokens per record, image tokens included.

    Attributes:
        records: Number of records.
        cut: Number of records that are truncated at ``max_length``.
        lost: Number of these in which no supervised token is left.
        percentiles: Number of tokens that a share of the records, in percent, does not exceed.
    """

    records: int
    cut: int
    lost: int
    percentiles: Mapping[int, int]


@dataclass(frozen=True, slots=True, repr=False)
class LengthReport(ReadableRepr):
    """Lengths and letter heights of a file of records.

    Attributes:
        total: Number of records in the file.
        max_length: Tokens per record.
        every: All examined records.
        ocr: Those that ask one of the ten OCR instructions.
        heights: Letter height in pixels of the tower's input that a share of the records, in percent, does not exceed.
        too_small: Number of records whose text is too small to be read at this resolution, by the median line.
    """

    total: int
    max_length: int
    every: AnswerLengths
    ocr: AnswerLengths
    heights: Mapping[int, float]
    too_small: TooSmall

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return asdict(self)


def report_lengths(
    records: Sequence[Any],
    processor: LlavarProcessor,
    max_length: int,
    roots: ImageRoots | None = None,
    smallest: float = SMALLEST_LETTERS,
    progress: Callable[[int, int], None] | None = None,
) -> LengthReport:
    """Measure records as training will see them.

    Args:
        records: In the released format.
        processor: The model's processor, with its image mode for training.
        max_length: Tokens per record.
        roots: Folders of images whose size is not in their record; None leaves out the letters of these images.
        smallest: Height in pixels of the tower's input from which letters can be read.
        progress: Called with the number of records done and in total.

    Raises:
        DataError: A record is malformed, or there is none.
        ImageError: An image that has to be measured cannot be opened.
    """
    if not records:
        raise DataError.at("records", "are empty", "give a file with at least one")
    count = min(_MAX_RECORDS, len(records))
    rows: list[tuple[bool, int, bool]] = []
    heights: list[float] = []
    for number in range(count):
        record = records[number * len(records) // count]
        where = f"record {number * len(records) // count}"
        conversation = parse_record(record, where)
        example = encode_conversation(conversation, processor, _NO_LIMIT, roots=roots)
        lost = bool((example.labels[:max_length] == -100).all())
        ocr = any(words in turn.text for words in OCR_INSTRUCTIONS for turn in conversation.turns[:1])
        rows.append((ocr, len(example.input_ids), lost))
        image = next(iter(conversation.images), None)
        path = image if isinstance(image, str) else None
        text = VqaQuestion(conversation.id, "", (), path, **read_text_size(record, where))
        heights += [
            height
            for height, _ in measure_letter_height([text], roots, processor.image_mode, processor).values()
            if height
        ]
        if progress is not None:
            progress(number + 1, count)
    return LengthReport(
        total=len(records),
        max_length=max_length,
        every=_lengths(rows, max_length),
        ocr=_lengths([row for row in rows if row[0]], max_length),
        heights={share: round(float(np.percentile(heights, share)), 1) for share in _SHARES} if heights else {},
        too_small=TooSmall(sum(height < smallest for height in heights), len(heights), smallest),
    )


def _lengths(rows: Sequence[tuple[bool, int, bool]], max_length: int) -> AnswerLengths:
    tokens = [length for _, length, _ in rows]
    cut = [lost for _, length, lost in rows if length > max_length]
    within = {share: int(np.percentile(tokens, share, method="higher")) for share in _SHARES} if tokens else {}
    return AnswerLengths(len(rows), len(cut), sum(cut), within)
