"""MME's yes-or-no questions, two on each image: accuracy, and accuracy+ over images.

Two rules for reading an answer as yes or no are reported, each under its name:

``mme``             the original's: ``yes``, else ``no``, within the first four characters; anything else is wrong
``mme-first-word``  the first whole word that is ``yes`` or ``no``, anywhere in the answer

A part of the benchmark can be scored if it has both questions of each image. An image with one question is an error,
since accuracy+ counts pairs.

Source: MME, arXiv 2306.13394, eval_tool/calculation.py; LLaVAR, MME/mme_eval.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import numpy as np

from llavar_peft.errors import DataError
from llavar_peft.evaluation.vqa.answer_metrics import Score
from llavar_peft.evaluation.vqa.confidence_intervals import ratio_intervals
from llavar_peft.evaluation.vqa.scored_results import Answered, Figure, Results, Setting
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion
from llavar_peft.text_files import read_text
from llavar_peft.types import expand_home

Rule = Literal["mme", "mme-first-word"]
TASK: Final = "OCR"
"""The one of MME's fourteen tasks that is about text."""

_PREFIX: Final = 4
_WORD: Final = re.compile(r"\b(yes|no)\b")
_EXTENSIONS: Final = (".jpg", ".jpeg", ".png")
_PAIR: Final = 2


def read_answers(path: str | Path) -> tuple[VqaQuestion, ...]:
    """Read a file of answers in MME's format: image, question, truth and answer, separated by tabs.

    Raises:
        DataError: The file cannot be read, a line has fewer than four columns, or a truth is neither yes nor no.
    """
    questions: list[VqaQuestion] = []
    for number, line in enumerate(_lines(expand_home(path)), 1):
        columns = line.split("\t", 3)
        if len(columns) != 4:
            raise DataError.at(
                f"{path}:{number}",
                f"has {len(columns)} columns, expected image, question, truth, answer",
                "separate them by tabs",
            )
        image, question, truth, answer = columns
        identity = str(len(questions))
        questions.append(
            VqaQuestion(identity, question, (_truth(truth, f"{path}:{number}"),), image=image, answer=answer)
        )
    return _check_pairs(questions, str(path))


def read_folder(folder: str | Path) -> tuple[tuple[VqaQuestion, ...], Path]:
    """Read the folder of MME's task, in either of its two layouts.

    Args:
        folder: ``OCR``, or the whole benchmark that contains it.

    Returns:
        The questions, and the folder of their images.

    Raises:
        DataError: The folder does not exist, or a question has no image.
    """
    given = expand_home(folder)
    root = given / TASK if (given / TASK).is_dir() else given
    apart = (root / "questions_answers_YN").is_dir()
    texts, images = (root / "questions_answers_YN", root / "images") if apart else (root, root)
    questions: list[VqaQuestion] = []
    for text in sorted(texts.glob("*.txt")):
        image = next(
            (f"{text.stem}{extension}" for extension in _EXTENSIONS if (images / f"{text.stem}{extension}").is_file()),
            None,
        )
        if image is None:
            raise DataError.at(str(text), f"has no image {text.stem}.jpg in {images}", "download the benchmark again")
        for number, line in enumerate(_lines(text), 1):
            question, _, truth = line.rpartition("\t")
            where = f"{text}:{number}"
            questions.append(VqaQuestion(str(len(questions)), question, (_truth(truth, where),), image=image))
    return _check_pairs(questions, str(root)), images


def _lines(path: Path) -> list[str]:
    return [line for line in read_text(path).split("\n") if line.strip()]


def _truth(text: str, where: str) -> str:
    if text.strip().lower() not in ("yes", "no"):
        raise DataError.at(where, f"the truth is neither yes nor no (got {text!r})", "download the file again")
    return text.strip().lower()


def _check_pairs(questions: Sequence[VqaQuestion], where: str) -> tuple[VqaQuestion, ...]:
    if not questions:
        raise DataError.at(where, "holds no questions", "give MME's folder, or a file of answers")
    for image, members in _by_image(questions).items():
        if len(members) != _PAIR:
            raise DataError.at(
                where, f"has {len(members)} questions on {image}, expected {_PAIR}", "give each question once"
            )
    return tuple(questions)


def _by_image(questions: Sequence[VqaQuestion]) -> dict[str, list[VqaQuestion]]:
    found: dict[str, list[VqaQuestion]] = {}
    for question in questions:
        found.setdefault(str(question.image), []).append(question)
    return found


def read_yes_or_no(answer: str, rule: Rule) -> str | None:
    """Read an answer as ``"yes"``, ``"no"``, or None for neither, by one of the rules at the top of this file."""
    lowered = answer.lower()
    if rule == "mme":
        start = lowered[:_PREFIX]
        return "yes" if "yes" in start else "no" if "no" in start else None
    found = _WORD.search(lowered)
    return found.group(1) if found else None


def score_images(questions: Sequence[VqaQuestion], source: str, setting: Setting) -> Results:
    """Score answers by both rules.

    Args:
        questions: Two on each image, with their answers.
        source: Name of the data set.
        setting: How the answers were generated.

    Returns:
        For each rule accuracy and accuracy+ in percent, their sum (MME's score, of 200), and the share of answers that
        are neither yes nor no. Intervals count images.
    """
    rules: tuple[Rule, ...] = ("mme", "mme-first-word")
    records = [
        Answered(
            question.id, question.question, question.answer or "", question.truths, question.image, question.fields,
            {rule: Score(float(read_yes_or_no(question.answer or "", rule) == question.truths[0])) for rule in rules},
        )
        for question in questions
    ]  # fmt: skip
    figures = [figure for rule in rules for figure in _figures(records, rule, setting)]
    return Results(source, setting, tuple(figures), tuple(records))


def _figures(records: Sequence[Answered], rule: Rule, setting: Setting) -> list[Figure]:
    pairs: dict[str | None, list[Answered]] = {}
    for record in records:
        pairs.setdefault(record.image, []).append(record)
    right = np.array([sum(record.scores[rule].points for record in pair) for pair in pairs.values()])
    neither = np.array([sum(read_yes_or_no(one.answer, rule) is None for one in pair) for pair in pairs.values()])
    whole = (right == _PAIR).astype(float)
    columns = {"accuracy": right, "accuracy+": whole, "score": right / _PAIR + whole, "neither": neither}
    points = np.stack(list(columns.values()), axis=1).astype(float)
    out_of = np.broadcast_to([_PAIR, 1.0, 1.0, _PAIR], points.shape)
    # The score, of 2, is no proportion.
    counts = ratio_intervals(points, out_of)
    counts[2:3] = ratio_intervals(points[:, 2:3], out_of[:, 2:3], counts=False)
    return [
        Figure(f"{rule} {name}", 100 * float(value), 100 * low, 100 * high, len(records), name == "neither", setting)
        for name, value, (low, high) in zip(columns, points.sum(axis=0) / out_of.sum(axis=0), counts, strict=True)
    ]
