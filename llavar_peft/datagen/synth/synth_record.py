"""The record of a synthetic image in the released format, and its ground truth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Final

from llavar_peft.constants import IMAGE_PLACEHOLDER, OCR_INSTRUCTIONS
from llavar_peft.data.json_schema import AnswerSchema, schema_of_fields, write_fields
from llavar_peft.datagen.synth.drawn_page import DrawnPage
from llavar_peft.datagen.synth.scene import PlacedLine, Quad
from llavar_peft.datagen.synth.synth_settings import SynthSettings

_MAX_RUN: Final = 6  # lines over which an answer may be wrapped


def describe_page(
    page: DrawnPage, index: int, settings: SynthSettings
) -> tuple[str, bytes, dict[str, Any], dict[str, Any]]:
    """Return the name and bytes of an image's file, its record, and its ground truth.

    In addition to the format's fields, the record has the kind, the language and the position of its first answer,
    by which ``eval diagnose`` groups results, and the height that its letters were to have.

    Args:
        page: The image.
        index: Its number.
        settings: The settings with which it was drawn.
    """
    suffix, data = page.encoded()
    name = f"{page.kind}_{index:06d}{suffix}"
    record = _make_record(page, name, settings)
    record |= {
        "kind": page.kind,
        "language": page.language,
        "image_width": page.image.width,
        "image_height": page.image.height,
        **_measure_first(record, page),
    }
    if page.letters is not None:
        record |= {"drawn_height": page.letters[0], "prepared_side": page.letters[1]}
    lines = [
        {
            "text": line.text,
            "polygon": [[round(x, 2), round(y, 2)] for x, y in quad],
            "box": _bounding_box([quad]),
            "paragraph": line.block,
            "size": line.size,
            "font": Path(line.face).stem,
        }
        for line, quad in zip(page.lines, page.quads, strict=True)
    ]
    truth = {
        "id": record["id"],
        "image": name,
        "kind": page.kind,
        "language": page.language,
        "width": page.image.width,
        "height": page.image.height,
        "text": page.transcript,
        "lines": lines,
        "questions": [list(pair) for pair in page.questions],
        **({"fields": page.fields} if page.fields else {}),
    }
    return name, data, record, truth


def measure_page(page: DrawnPage, settings: SynthSettings) -> dict[str, Any]:
    """Measure the first answer of an image's record as ``measure_answer`` does."""
    return _measure_first(_make_record(page, "", settings), page)


def _measure_first(record: dict[str, Any], page: DrawnPage) -> dict[str, Any]:
    question, answer = (turn["value"] for turn in record["conversations"][:2])
    return measure_answer(question.replace(IMAGE_PLACEHOLDER, ""), answer, page.lines, page.quads)


def _make_record(page: DrawnPage, name: str, settings: SynthSettings) -> dict[str, Any]:
    """Return the id, the image and the conversation.

    ``transcribe`` asks for all text, by one of ``OCR_INSTRUCTIONS`` (stage 1); ``question`` asks one of the image's
    questions; ``conversation`` asks all of them in random order, as turns of one conversation (stage 2); ``extract``
    asks for the fields as JSON, and gives their schema.

    Args:
        page: The image, whose number selects among the questions and whether the image precedes the first one.
        name: Its file name.
        settings: The settings with which it was drawn.
    """
    task, rng = settings.task, Random(f"record/{settings.seed}/{page.number}")
    if task == "transcribe":
        pairs = [(rng.choice(OCR_INSTRUCTIONS), page.transcript)]
    elif task == "extract":
        schema = AnswerSchema(schema_of_fields(page.fields))
        pairs = [(schema.question, write_fields(page.fields))]
    else:
        pairs = rng.sample(page.questions, 1 if task == "question" else len(page.questions))
    first = rng.choice((IMAGE_PLACEHOLDER + "\n{}", "{}\n" + IMAGE_PLACEHOLDER)).format(pairs[0][0])
    turns = list[dict[str, str]]()
    for number, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": question if number else first})
        turns.append({"from": "gpt", "value": answer})
    return {"id": Path(name).stem, "image": name, "conversations": turns}


def measure_answer(question: str, answer: str, lines: Sequence[PlacedLine], quads: Sequence[Quad]) -> dict[str, Any]:
    """Measure the lines that contain an answer, for ``eval diagnose``.

    Args:
        question: Selects among lines with the same text the one after a label that the question names.
        answer: The answer, which may be a whole transcript.
        lines: The image's text, in reading order.
        quads: Corners of each line's ink in pixels.

    Returns:
        ``text_height``, the median height of the lines' ink in pixels, and ``box`` around them if they are few.
    """
    run = _find_answer(question, answer, lines)
    if run is None:
        return {"text_height": _line_height(quads)}
    found = [quads[number] for number in run]
    return {"text_height": _line_height(found), "box": _bounding_box(found)}


def _line_height(quads: Sequence[Quad]) -> float:
    """Return the median height in pixels, measured along the lines' sides so that a slant adds nothing."""
    heights = [(math.dist(quad[0], quad[3]) + math.dist(quad[1], quad[2])) / 2 for quad in quads]
    return round(median(heights), 2)


def _bounding_box(quads: Sequence[Quad]) -> list[float]:
    """Return left, top, right, bottom in pixels."""
    xs = [x for quad in quads for x, _ in quad]
    ys = [y for quad in quads for _, y in quad]
    return [round(value, 2) for value in (min(xs), min(ys), max(xs), max(ys))]


def _find_answer(question: str, answer: str, lines: Sequence[PlacedLine]) -> range | None:
    """Return the lines that contain the answer and the fewest other words, preferably after a label in the question."""
    expected = answer.split()
    best: tuple[int, bool, int] | None = None
    found = None
    for start in range(len(lines)):
        for end in range(start + 1, min(len(lines), start + _MAX_RUN) + 1):
            words = [word for line in lines[start:end] for word in line.text.split()]
            if not any(words[at : at + len(expected)] == expected for at in range(len(words) - len(expected) + 1)):
                continue
            unlabeled = start == 0 or lines[start - 1].text not in question
            key = (len(words), unlabeled, start)
            if best is None or key < best:
                best, found = key, range(start, end)
            break
    return found
