"""GPT-4 as judge, as the original asks it: two answers to a question about an image that the judge knows in words.

Source: LLaVAR, llava/eval/eval_gpt_review_visual.py. That program cannot run the 50 ``read`` questions on the released
contexts (a single caption, no objects); here they are judged as their rule says, by the caption with its OCR result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from llavar_peft.atomic_files import dump_json, write_text
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.errors import DataError
from llavar_peft.evaluation.vqa.answer_settings import read_stated_settings
from llavar_peft.evaluation.vqa.scored_results import Setting
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion

SYSTEM: Final = "You are a helpful and precise assistant for checking the quality of the answer."
"""The system text, byte for byte the original's."""

_COCO: Final = "COCO_val2014_"


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """An answer to be judged.

    Attributes:
        id: The answer's, or its question's where it has none.
        text: Its words.
        how: What its file says of how it was got; see ``stated.stated_in``.
    """

    id: int | str
    text: str
    how: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """One question to be judged.

    Attributes:
        question_id: The question's.
        category: Names the rule.
        question: Its words.
        context: What is in the image, in words.
        role: What the rule calls the two sides, e.g. ``"Assistant"``.
        rule: What the judge is told to do.
        reference: The answer that ours is held against.
        ours: Our answer.
    """

    question_id: int | str
    category: str
    question: str
    context: str
    role: str
    rule: str
    reference: ModelAnswer
    ours: ModelAnswer

    def prompt(self, *, swapped: bool = False) -> str:
        """What the judge is asked.

        Args:
            swapped: Whether our answer is shown first.

        Returns:
            The user's message, laid out as in the original.
        """
        first, second = (self.ours, self.reference) if swapped else (self.reference, self.ours)
        return (
            f"[Context]\n{self.context}\n\n"
            f"[VqaQuestion]\n{self.question}\n\n"
            f"[{self.role} 1]\n{first.text}\n\n[End of {self.role} 1]\n\n"
            f"[{self.role} 2]\n{second.text}\n\n[End of {self.role} 2]\n\n"
            f"[System]\n{self.rule}\n\n"
        )


def read_cases(questions: Path, contexts: Path, rules: Path, reference: Path, answers: Path) -> tuple[Case, ...]:
    """Put the released files together.

    Contexts are found by their image: their ids are off by one from the questions' in the 50, and others altogether
    in the 90. Answers are found by ``question_id``.

    Args:
        questions: JSON lines of ``question_id``, ``image``, ``text``, ``category``.
        contexts: JSON lines of ``image``, ``captions`` (a list or one text) and perhaps ``instances``.
        rules: ``rule.json`` or ``rule_read_v3.json``.
        reference: JSON lines of ``question_id`` and ``text``: GPT-4's answers.
        answers: The same, by the model that is judged.

    Returns:
        The questions in their file's order.

    Raises:
        DataError: A file cannot be read, or something of a question is in none of them.
    """
    ways = _read_rules(rules)
    scenes = {str(_get(row, "image", where)): _context(row, where) for where, row in _rows(contexts)}
    first, second = _read_said(reference), _read_said(answers)
    cases = []
    for where, row in _rows(questions):
        identity, category, image = (_get(row, key, where) for key in ("question_id", "category", "image"))
        way = _find(ways, category, where, f"no rule for {category!r} in {rules}")
        role, rule = str(_get(way, "role", str(rules))), str(_get(way, "prompt", str(rules)))
        context = _find(scenes, str(image), where, f"no context for {image!r} in {contexts}")
        one = _find(first, str(identity), where, f"no answer in {reference}")
        other = _find(second, str(identity), where, f"no answer in {answers}")
        cases.append(Case(identity, str(category), str(_get(row, "text", where)), context, role, rule, one, other))
    if not cases:
        raise DataError.at(str(questions), "holds no questions", "give a file with at least one")
    return tuple(cases)


def read_unanswered(questions: Path, roots: ImageRoots) -> tuple[VqaQuestion, ...]:
    """Read questions that a model is to answer before it is judged.

    Args:
        questions: As for ``read_cases``.
        roots: Where the images are, under the names in the file or, COCO's, with ``COCO_val2014_`` before them.

    Returns:
        The questions, without truths.

    Raises:
        DataError: The file cannot be read.
    """
    found = []
    for where, row in _rows(questions):
        identity, image, text = (str(_get(row, key, where)) for key in ("question_id", "image", "text"))
        coco = f"{_COCO}{image}"
        found.append(VqaQuestion(identity, text, (), image=coco if _is_there(coco, roots) else image))
    return tuple(found)


def write_judge_answers(answered: Sequence[VqaQuestion], setting: Setting, path: Path) -> None:
    """Write a model's answers in the original's form.

    Args:
        answered: With their answers.
        setting: How they were got.
        path: JSON lines.
    """
    how = {key: value for key, value in asdict(setting).items() if value is not None}
    rows = [
        {
            "question_id": int(one.id) if one.id.isdecimal() else one.id,
            "prompt": one.question,
            "text": one.answer,
            "answer_id": f"{setting.model_hash}-{one.id}",
            "model_id": setting.model,
            "metadata": how,
        }
        for one in answered
    ]
    write_text(path, "".join(dump_json(row) + "\n" for row in rows))


def _is_there(image: str, roots: ImageRoots) -> bool:
    return any((root / image).is_file() for root in roots.roots)


def _read_rules(path: Path) -> Mapping[str, Any]:
    try:
        rules = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError.at(str(path), f"cannot be read ({error})", "give rule.json or rule_read_v3.json") from error
    if not isinstance(rules, Mapping):
        raise DataError.at(str(path), "is no object of rules", "give rule.json or rule_read_v3.json")
    return rules


def _context(row: Mapping[str, Any], where: str) -> str:
    captions, objects = _get(row, "captions", where), row.get("instances")
    text = captions if isinstance(captions, str) else "\n".join(str(caption) for caption in captions)
    if objects is None:
        return text
    return f"{text}\n\n" + "\n".join(f"{_get(one, 'category', where)}: {_get(one, 'bbox', where)}" for one in objects)


def _read_said(path: Path) -> dict[Any, ModelAnswer]:
    found = {}
    for where, row in _rows(path):
        identity = _get(row, "question_id", where)
        found[str(identity)] = ModelAnswer(
            row.get("answer_id", identity), str(_get(row, "text", where)), read_stated_settings(row)
        )
    return found


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError.at(str(path), f"cannot be read ({error})", "correct the path") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError.at(f"{path}:{number}", f"is not JSON ({error})", "write or fetch the file again") from error
        yield f"{path}:{number}", row


def _get(row: Any, key: str, where: str) -> Any:
    if not isinstance(row, Mapping) or row.get(key) is None:
        raise DataError.at(where, f"has no {key!r}", "write or fetch the file again")
    return row[key]


def _find(among: Mapping[Any, Any], key: Any, where: str, what: str) -> Any:
    if key not in among:
        raise DataError.at(where, what, "give the files that belong together")
    return among[key]
