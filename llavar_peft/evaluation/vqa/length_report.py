"""What records ask of a model before it is trained on them: which are cut at ``max_length``, how small their text is.

Tokens are those of the model's own processor. Letters are as high as the records say (``text_height`` or ``box``, with
``image_width`` and ``image_height``), which ``synth`` and ``ocr build`` write, seen at the size that the tower sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from llavar_peft.constants import OCR_INSTRUCTIONS
from llavar_peft.data.encode_record import encode_conversation
from llavar_peft.data.record_store import parse_record
from llavar_peft.errors import DataError
from llavar_peft.evaluation.vqa.diagnose_results import SMALLEST, TooSmall, measure_letter_height
from llavar_peft.evaluation.vqa.text_size import read_text_size
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion

if TYPE_CHECKING:
    from llavar_peft.data.image_preparation import ImageRoots
    from llavar_peft.models.processing_llavar import LlavarProcessor

MOST: Final = 20_000
"""Records that are looked at, evenly spread; a million would take minutes and say the same."""
_SHARES: Final = (50, 90, 99, 100)
_WHOLE: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class AnswerLengths:
    """Tokens of some records, the image's included.

    Attributes:
        records: How many.
        cut: Whose target is cut at ``max_length``.
        lost: Of these, those of which nothing is left to learn.
        percentiles: Tokens that a share of the records, in percent, stays within.
    """

    records: int
    cut: int
    lost: int
    percentiles: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class LengthReport:
    """What was found.

    Attributes:
        total: Records in the file.
        max_length: Tokens per record.
        every: All that were looked at.
        ocr: Those that ask one of the ten OCR instructions.
        heights: Height of the letters in pixels of the tower that a share of the records, in percent, stays within.
        too_small: How many records hold text that cannot be read at this resolution; the median line counts.
    """

    total: int
    max_length: int
    every: AnswerLengths
    ocr: AnswerLengths
    heights: Mapping[int, float]
    too_small: TooSmall

    def as_dict(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return asdict(self)


def report_lengths(
    records: Sequence[Any],
    processor: LlavarProcessor,
    max_length: int,
    roots: ImageRoots | None = None,
    smallest: float = SMALLEST,
    progress: Callable[[int, int], None] | None = None,
) -> LengthReport:
    """Look at records as training will.

    Args:
        records: In the released format.
        processor: The model's; its training image mode counts.
        max_length: Tokens per record.
        roots: Where images are whose size a record does not say; None leaves their letters out.
        smallest: Height in the tower's pixels from which letters can be read.
        progress: Called with (records done, records in all).

    Returns:
        What was found.

    Raises:
        DataError: A record is malformed, or there is none.
        ImageError: An image has to be measured and cannot be opened.
    """
    if not records:
        raise DataError.at("records", "there are none", "give a file with at least one")
    count = min(MOST, len(records))
    rows: list[tuple[bool, int, bool]] = []
    heights: list[float] = []
    side = int(processor.image_processor.crop_size["height"])
    for number in range(count):
        record = records[number * len(records) // count]
        where = f"record {number * len(records) // count}"
        conversation = parse_record(record, where)
        example = encode_conversation(conversation, processor, _WHOLE, roots=roots)
        lost = bool((example.labels[:max_length] == -100).all())
        ocr = any(words in turn.text for words in OCR_INSTRUCTIONS for turn in conversation.turns[:1])
        rows.append((ocr, len(example.input_ids), lost))
        image = next(iter(conversation.images), None)
        text = VqaQuestion(conversation.id, "", (), image, **read_text_size(record, where))
        heights += [
            height for height, _ in measure_letter_height([text], roots, processor.image_mode, side).values() if height
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
