"""Cases for GPT-4 as judge: two answers to a question about an image that is described to the judge in words.

Source: LLaVAR, llava/eval/eval_gpt_review_visual.py. That program cannot run the 50 ``read`` questions on the released
contexts (a single caption, no objects); here they are judged by the caption with its OCR result, as their rule says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from llavar_peft.atomic_files import dump_json, write_text
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.text_metrics import is_blank
from llavar_peft.errors import DataError
from llavar_peft.evaluation.vqa.answer_settings import read_stated_settings
from llavar_peft.evaluation.vqa.scored_results import Setting
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion
from llavar_peft.text_files import read_json, read_json_lines

SYSTEM: Final = "You are a helpful and precise assistant for checking the quality of the answer."
"""The system message, byte for byte the original's."""

_COCO: Final = "COCO_val2014_"
_FIX_FILE: Final = "correct the file, or download it again"


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """An answer to be judged.

    Attributes:
        id: Id of the answer, or of its question if it has none.
        text: The answer.
        settings: How it was generated, as far as its file states it; see ``read_stated_settings``.
    """

    id: int | str
    text: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class JudgeCase:
    """One question to be judged.

    Attributes:
        category: Kind of question, which selects the rule.
        context: The image in words.
        role: What the prompt calls the two answers, for example ``"Assistant"``.
        rule: Instructions to the judge.
        reference: The answer that ours is compared with.
        ours: The answer of the model under evaluation.
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
        """Return the user message, in the original's layout.

        Args:
            swapped: Whether our answer is shown first.
        """
        first, second = (self.ours, self.reference) if swapped else (self.reference, self.ours)
        return (
            f"[Context]\n{self.context}\n\n"
            f"[Question]\n{self.question}\n\n"
            f"[{self.role} 1]\n{first.text}\n\n[End of {self.role} 1]\n\n"
            f"[{self.role} 2]\n{second.text}\n\n[End of {self.role} 2]\n\n"
            f"[System]\n{self.rule}\n\n"
        )


def read_cases(questions: Path, contexts: Path, rules: Path, reference: Path, answers: Path) -> tuple[JudgeCase, ...]:
    """Join the released files into cases, in the order of the questions.

    Contexts are matched by image, because their ids differ from the questions' (by one in the 50 questions, entirely
    in the 90). Answers are matched by ``question_id``.

    Args:
        questions: JSON lines of ``question_id``, ``image``, ``text``, ``category``.
        contexts: JSON lines of ``image``, ``captions`` (a list or one text) and, optionally, ``instances``.
        rules: ``rule.json`` or ``rule_read_v3.json``.
        reference: JSON lines of ``question_id`` and ``text``: GPT-4's answers.
        answers: The same for the model under evaluation.

    Raises:
        DataError: A file cannot be read, or a question has no context, rule or answer.
    """
    rule_of = _read_rules(rules)
    context_of = {
        str(_get(row, "image", where)): _format_context(row, where) for where, row in read_json_lines(contexts)
    }
    references, ours = _read_answers(reference), _read_answers(answers)
    cases = []
    for where, row in read_json_lines(questions):
        identity, category, image = (_get(row, key, where) for key in ("question_id", "category", "image"))
        entry = _find(rule_of, category, where, f"no rule for {category!r} in {rules}")
        case = JudgeCase(
            question_id=identity,
            category=str(category),
            question=str(_get(row, "text", where)),
            context=_find(context_of, str(image), where, f"no context for {image!r} in {contexts}"),
            role=str(_get(entry, "role", str(rules))),
            rule=str(_get(entry, "prompt", str(rules))),
            reference=_find(references, str(identity), where, f"no answer in {reference}"),
            ours=_find(ours, str(identity), where, f"no answer in {answers}"),
        )
        if is_blank(case.reference.text):
            raise DataError.at(
                where, f"its answer in {reference} is empty, so that nothing can be compared with it",
                "write the answer, or remove the question",
            )  # fmt: skip
        cases.append(case)
    if not cases:
        raise DataError.at(str(questions), "contains no questions", "use a file with at least one")
    return tuple(cases)


def read_unanswered(questions: Path, roots: ImageRoots) -> tuple[VqaQuestion, ...]:
    """Read questions that a model answers before it is judged.

    Args:
        questions: As for ``read_cases``.
        roots: Folders of the images. COCO's may be named with ``COCO_val2014_`` before the name in the file.

    Returns:
        The questions, without expected answers.

    Raises:
        DataError: The file cannot be read.
    """
    found = []
    for where, row in read_json_lines(questions):
        identity, image, text = (str(_get(row, key, where)) for key in ("question_id", "image", "text"))
        coco = f"{_COCO}{image}"
        exists = any((root / coco).is_file() for root in roots.roots)
        found.append(VqaQuestion(identity, text, (), image=coco if exists else image))
    if not found:
        raise DataError.at(str(questions), "contains no questions", "use a file with at least one")
    return tuple(found)


def write_judge_answers(answered: Sequence[VqaQuestion], setting: Setting, path: Path) -> None:
    """Write a model's answers as JSON lines in the original's format, with the settings as ``metadata``."""
    metadata = {key: value for key, value in asdict(setting).items() if value is not None}
    rows = [
        {
            "question_id": int(one.id) if one.id.isdecimal() else one.id,
            "prompt": one.question,
            "text": one.answer,
            "answer_id": f"{setting.model_hash}-{one.id}",
            "model_id": setting.model,
            "metadata": metadata,
        }
        for one in answered
    ]
    write_text(path, "".join(dump_json(row) + "\n" for row in rows))


def _read_rules(path: Path) -> Mapping[str, Any]:
    rules = read_json(path, fix="use rule.json or rule_read_v3.json", unique=True)
    if not isinstance(rules, Mapping):
        raise DataError.at(str(path), "is not a JSON object of rules", "use rule.json or rule_read_v3.json")
    return rules


def _format_context(row: Mapping[str, Any], where: str) -> str:
    captions, objects = _get(row, "captions", where), row.get("instances")
    if not isinstance(captions, str | list) or not isinstance(objects, list | None):
        raise DataError.at(where, "'captions' or 'instances' has the wrong type (expected lists)", _FIX_FILE)
    text = captions if isinstance(captions, str) else "\n".join(str(caption) for caption in captions)
    if objects is None:
        return text
    return f"{text}\n\n" + "\n".join(f"{_get(one, 'category', where)}: {_get(one, 'bbox', where)}" for one in objects)


def _read_answers(path: Path) -> dict[Any, ModelAnswer]:
    found = {}
    for where, row in read_json_lines(path, lenient=True):
        identity = _get(row, "question_id", where)
        found[str(identity)] = ModelAnswer(
            row.get("answer_id", identity), str(_get(row, "text", where)), read_stated_settings(row)
        )
    return found


def _get(row: Any, key: str, where: str) -> Any:
    if not isinstance(row, Mapping) or row.get(key) is None:
        raise DataError.at(where, f"has no {key!r}", _FIX_FILE)
    return row[key]


def _find(among: Mapping[Any, Any], key: Any, where: str, what: str) -> Any:
    if not isinstance(key, str | int) or key not in among:
        raise DataError.at(where, what, "use files that belong together")
    return among[key]
