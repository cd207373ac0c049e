"""Question and answer files in the original's format, and the journal from which an interrupted run resumes.

Source: LLaVAR, llava/eval/model_vqa.py.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llavar_peft.atomic_files import dump_json, write_json, write_text
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.data.resume_journal import ResumeJournal, check_settings, read_entries
from llavar_peft.errors import DAMAGED, ConfigError, DataError, Fault, ImageError
from llavar_peft.text_files import (
    check_is_file,
    parse_json,
    question_problem,
    read_bytes,
    read_json_lines,
    text_problem,
)

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

_COCO_PREFIX: Final = "COCO_val2014_"
_NAMESPACE: Final = uuid.UUID("6f1c0c3e-6a52-5d0e-9d8e-2f6b1f0d7a11")  # arbitrary but fixed
_EXAMPLE = 'write {"question_id": 1, "image": "a.png", "text": "Who?"}'
_MAX_FAULTS: Final = 20  # listed in a message
_LONGEST_VALUE: Final = 80  # characters


@dataclass(frozen=True, slots=True)
class ImageQuestion:
    """A line of the question file.

    Attributes:
        place: Index among the questions, from 0.
        where: File and line.
        id: ``question_id`` as written in the file.
        image: Path of the image within the image folder, None for a question without one.
    """

    place: int
    where: str
    id: Any
    text: str
    image: str | None

    def find_image(self, roots: ImageRoots) -> Path | None:
        """Return the image's file, None for a question without an image.

        As in ``model_vqa``, an image of COCO may be named by its number alone.

        Raises:
            ImageError: The file is missing, or outside the image folders.
        """
        if self.image is None:
            return None
        try:
            return roots.resolve(self.image)
        except ImageError as error:
            folder, slash, name = self.image.rpartition("/")
            try:
                return roots.resolve(f"{folder}{slash}{_COCO_PREFIX}{name}", guess=False)
            except ImageError:
                raise error from None


def read_question_file(path: Path) -> list[ImageQuestion]:
    """Read JSON lines with ``question_id``, ``text`` and, optionally, ``image``.

    Raises:
        ConfigError: The file is missing or contains no question.
        DataError: Some lines are not questions.
    """
    fix = "use a file of questions, one per line"
    check_is_file(path, error=ConfigError, fix=fix)
    questions: list[ImageQuestion] = []
    faults: list[Fault] = []
    for where, fields in read_json_lines(path, fix=_EXAMPLE, faults=faults):
        if isinstance(fields, list) and fields and isinstance(fields[0], dict):
            raise DataError.at(where, "is a JSON array, expected one question per line", _EXAMPLE)
        problem = _find_problem(fields)
        if problem:
            faults.append(Fault(where, problem, _EXAMPLE))
        else:
            questions.append(
                ImageQuestion(len(questions), where, fields["question_id"], fields["text"], fields.get("image") or None)
            )
    if faults and not questions and path.read_bytes().lstrip().split(b"\n")[0].strip() in (b"[", b"{", b"[{"):
        # Most lines of an array, or of an object that is written over several lines, are no JSON by themselves.
        raise DataError.at(str(path), f"is not one question per line, but JSON over {len(faults)} lines", _EXAMPLE)
    if faults:
        raise DataError("\n".join(map(str, faults[:_MAX_FAULTS])), faults)
    if not questions:
        raise ConfigError.at(str(path), "contains no question", fix)
    return questions


def _find_problem(fields: Any) -> str | None:
    if not isinstance(fields, dict):
        return "is not a JSON object"
    if "question_id" not in fields:
        return "has no question_id"
    if not isinstance(fields.get("text"), str):
        return f"text is {_short(fields.get('text'))}, expected a string"
    if problem := question_problem(fields["text"]):
        return f"text {problem}"
    if not isinstance(fields["question_id"], str | int) or text_problem(str(fields["question_id"])):
        return f"question_id is {_short(fields['question_id'])}, expected a string or an integer"
    if not isinstance(fields.get("image"), str | None):
        return f"image is {_short(fields['image'])}, expected a path"
    return None


def _short(value: object) -> str:
    shown = ascii(value)
    return shown if len(shown) <= _LONGEST_VALUE else f"{shown[:_LONGEST_VALUE]}..."


class AnswerJournal:
    """The journal of a run in a hidden folder next to the answer file, with one ``ResumeJournal`` per process.

    Args:
        answers: The answer file.
        rank: Rank of this process.
    """

    def __init__(self, answers: Path, rank: int) -> None:
        self.folder = answers.with_name(f".{answers.name}.parts")
        self._path = self.folder / f"part-{rank:05d}.jsonl"
        self._settings = self.folder / "settings.json"

    @property
    def begun(self) -> bool:
        """Whether there is a run to resume."""
        return self._settings.is_file()

    def begin(self, settings: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]] = ()) -> None:
        """Begin a run, or check that the run to resume has the same settings. Only one process may call this.

        Args:
            settings: The settings that answers depend on, as JSON values.
            earlier: Entries that a new run starts with.

        Raises:
            ConfigError: The run to resume has other settings.
        """
        if not self.begun:
            self.remove()  # left by a run that was killed while removing it
            try:
                with ResumeJournal(self._path) as part:
                    part.append(*earlier)
                write_json(self._settings, settings)  # last: its existence says that the run has begun
            except BaseException:
                self.remove()
                raise
            return
        try:
            settings_before = dict(json.loads(self._settings.read_text(encoding="utf-8")))
        except DAMAGED:
            settings_before = {}
        check_settings(self.folder, settings_before, settings)

    def read(self) -> dict[int, dict[str, Any]]:
        """Return what all processes have done: ``{"text": ...}`` or ``{"skipped": why}`` by the question's place."""
        entries = {}
        for part in sorted(self.folder.glob("part-*.jsonl")):
            for _, entry in read_entries(part, has_heading=False):
                text = entry.get("text", entry.get("skipped"))
                if not (isinstance(entry.get("place"), int) and isinstance(text, str)):
                    raise DataError.at(str(part), "has an entry that is no answer", "delete the folder, and run again")
                entries[entry["place"]] = entry
        return entries

    def __enter__(self) -> Self:
        """Open this process's part for writing."""
        self._part = ResumeJournal(self._path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close this process's part."""
        self._part.__exit__(kind, error, trace)

    def write(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Append entries; they are on the disk when this returns."""
        if entries:
            self._part.append(*entries)
            self._part.sync()

    def remove(self) -> None:
        """Remove the folder, if it exists."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_answer_file(
    path: Path, questions: Sequence[ImageQuestion], entries: Mapping[int, Mapping[str, Any]], model: str
) -> int:
    """Write the answer file atomically, in the order of the questions.

    Args:
        path: The file.
        questions: All of them.
        entries: From ``AnswerJournal.read``.
        model: Value of ``model_id``.

    Returns:
        The number of answers, without skipped questions.
    """
    lines = []
    for question in questions:
        entry = entries[question.place]
        if "text" in entry:
            answer = {
                "question_id": question.id,
                "prompt": question.text,
                "text": entry["text"],
                # The original's is random. A derived one makes equal runs write equal files.
                "answer_id": str(uuid.uuid5(_NAMESPACE, json.dumps([model, question.place, question.id]))),
                "model_id": model,
                "metadata": {},
            }
            lines.append(dump_json(answer) + "\n")
    write_text(path, "".join(lines))
    return len(lines)


_ANSWER_START = b'{"question_id"'


def earlier_answers(path: Path, questions: Sequence[ImageQuestion], model: str) -> list[dict[str, Any]]:
    """Read an existing answer file: a finished one, or one that the original left unfinished.

    Args:
        path: The file; an incomplete last line is ignored.
        questions: The questions, in the order of the file; some may be unanswered.
        model: The ``model_id`` that the answers must have.

    Returns:
        The answers, as entries of an ``AnswerJournal``.

    Raises:
        ConfigError: The file answers other questions, or another model's answers are in it.
    """
    lines = read_bytes(path, error=ConfigError, fix="choose another output file").split(b"\n")
    remaining = iter(questions)  # the answers follow the order of the questions
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            answer = parse_json(line, f"{path}:{number}", path, lenient=True)
            id_and_text = (answer["question_id"], answer["prompt"])
            answered_by, text = answer["model_id"], answer["text"]
        except DAMAGED:
            # Only the beginning of an answer is an interrupted write; anything else is a file of another kind.
            if number == len(lines) and line[: len(_ANSWER_START)] == _ANSWER_START[: len(line)]:
                continue
            id_and_text, answered_by, text = None, model, None
        question = next((one for one in remaining if (one.id, one.text) == id_and_text), None)
        if question is None or answered_by != model:
            problem = "is not an answer to these questions"
            if question is not None:
                problem = f"is an answer by {_short(answered_by)}, expected {model!r}"
            raise ConfigError.at(f"{path}:{number}", problem, "choose another output file, or delete this one")
        entries.append({"place": question.place, "text": text})
    return entries
