"""MME's questions that are answered by yes or no, two on each image: accuracy, and accuracy+, of whole images.

Two ways of taking an answer for yes or no are reported, each under its name:

``mme``             the original's: ``yes``, else ``no``, among the first four letters; anything else is wrong
``mme-first-word``  the first whole word that is ``yes`` or ``no``, wherever it stands

A part of the benchmark is scored as the whole is, so long as its images have both their questions: accuracy+ is of
pairs, and a file or folder that holds one question of an image is refused, not scored as half a pair.

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

Rule = Literal["mme", "mme-first-word"]
TASK: Final = "OCR"
"""Of MME's fourteen kinds of question, the one about text."""

_PREFIX: Final = 4
_WORD: Final = re.compile(r"\b(yes|no)\b")
_ENDINGS: Final = (".jpg", ".jpeg", ".png")
_PAIR: Final = 2


def read_answers(path: str | Path) -> tuple[VqaQuestion, ...]:
    """Read a file of answers in MME's form: image, question, truth and answer, with tabs between.

    Args:
        path: Such a file.

    Returns:
        The questions with their answers.

    Raises:
        DataError: It cannot be read, or a line has less than four columns or another truth than yes or no.
    """
    questions: list[VqaQuestion] = []
    for number, line in enumerate(_lines(Path(path)), 1):
        columns = line.split("\t", 3)
        if len(columns) != 4:
            raise DataError.at(
                f"{path}:{number}", f"has {len(columns)} columns, expected picture, question, truth, answer", "use tabs"
            )
        image, question, truth, answer = columns
        identity = str(len(questions))
        questions.append(
            VqaQuestion(identity, question, (_truth(truth, f"{path}:{number}"),), image=image, answer=answer)
        )
    return _paired(questions, str(path))


def read_folder(folder: str | Path) -> tuple[tuple[VqaQuestion, ...], Path]:
    """Read MME's folder of one kind of question, in either of its two layouts.

    Args:
        folder: ``OCR``, or the whole benchmark with ``OCR`` in it.

    Returns:
        The questions, and the folder that their images lie in.

    Raises:
        DataError: No such folder, or a question without its image.
    """
    root = Path(folder) / TASK if (Path(folder) / TASK).is_dir() else Path(folder)
    apart = (root / "questions_answers_YN").is_dir()
    texts, images = (root / "questions_answers_YN", root / "images") if apart else (root, root)
    questions: list[VqaQuestion] = []
    for text in sorted(texts.glob("*.txt")):
        image = next((f"{text.stem}{end}" for end in _ENDINGS if (images / f"{text.stem}{end}").is_file()), None)
        if image is None:
            raise DataError.at(str(text), f"has no picture {text.stem}.jpg in {images}", "fetch the benchmark again")
        for number, line in enumerate(_lines(text), 1):
            question, _, truth = line.rpartition("\t")
            where = f"{text}:{number}"
            questions.append(VqaQuestion(str(len(questions)), question, (_truth(truth, where),), image=image))
    return _paired(questions, str(root)), images


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError.at(str(path), f"cannot be read ({error})", "correct the path") from error


def _truth(text: str, where: str) -> str:
    if text.strip().lower() not in ("yes", "no"):
        raise DataError.at(where, f"has another truth than yes or no (got {text!r})", "fetch the file again")
    return text.strip().lower()


def _paired(questions: Sequence[VqaQuestion], where: str) -> tuple[VqaQuestion, ...]:
    if not questions:
        raise DataError.at(where, "holds no questions", "give MME's folder, or a file of answers")
    for image, members in _by_image(questions).items():
        if len(members) != _PAIR:
            raise DataError.at(
                where, f"has {len(members)} questions on {image}, expected {_PAIR}", "give all questions, each once"
            )
    return tuple(questions)


def _by_image(questions: Sequence[VqaQuestion]) -> dict[str, list[VqaQuestion]]:
    found: dict[str, list[VqaQuestion]] = {}
    for question in questions:
        found.setdefault(str(question.image), []).append(question)
    return found


def read_yes_or_no(answer: str, rule: Rule) -> str | None:
    """Take an answer for yes or no.

    Args:
        answer: A model's.
        rule: See the top of this file.

    Returns:
        ``"yes"``, ``"no"``, or None for neither.
    """
    said = answer.lower()
    if rule == "mme":
        start = said[:_PREFIX]
        return "yes" if "yes" in start else "no" if "no" in start else None
    found = _WORD.search(said)
    return found.group(1) if found else None


def score_images(questions: Sequence[VqaQuestion], source: str, setting: Setting) -> Results:
    """Score answers by both rules.

    Args:
        questions: Two on each image, with their answers.
        source: What to call them.
        setting: How the answers were got.

    Returns:
        For each rule accuracy and accuracy+ in percent, their sum, which is MME's score (of 200), and the share of
        answers that are neither yes nor no. Intervals are of drawing images, since two questions belong to each.
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
    accuracy, whole = right / _PAIR, (right == _PAIR).astype(float)
    columns = {"accuracy": accuracy, "accuracy+": whole, "score": accuracy + whole, "neither": neither / _PAIR}
    points = np.stack(list(columns.values()), axis=1)
    intervals = ratio_intervals(points, np.ones_like(points))
    return [
        Figure(f"{rule} {name}", 100 * float(value), 100 * low, 100 * high, len(records), name == "neither", setting)
        for name, value, (low, high) in zip(columns, points.mean(axis=0), intervals, strict=True)
    ]
