"""The original's files of questions and answers, and the journal from which a killed run goes on.

Source: LLaVAR, llava/eval/model_vqa.py.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llavar_peft.atomic_files import write_json, write_text
from llavar_peft.data.image_roots import ImageRoots
from llavar_peft.errors import ConfigError, DataError, Fault, ImageError

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

_COCO_PREFIX: Final = "COCO_val2014_"
_NAMESPACE: Final = uuid.UUID("6f1c0c3e-6a52-5d0e-9d8e-2f6b1f0d7a11")  # any fixed one
_SHOWN: Final = 20  # faults


@dataclass(frozen=True, slots=True)
class ImageQuestion:
    """A line of the questions' file.

    Attributes:
        place: Its number among the questions, from 0.
        where: File and line.
        id: ``question_id``, as it stands there.
        text: The words.
        image: The image's path within the images' folder, None for a question without one.
    """

    place: int
    where: str
    id: Any
    text: str
    image: str | None

    def find_image(self, roots: ImageRoots) -> Path | None:
        """The image's file; as in ``model_vqa``, one of COCO may be named by its number alone.

        Args:
            roots: The images' folder.

        Returns:
            The file, None for a question without one.

        Raises:
            ImageError: It is missing, or outside the folder.
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
    """Read a file of questions: a JSON object with ``question_id``, ``text`` and perhaps ``image`` in each line.

    Args:
        path: The file.

    Returns:
        The questions, in order.

    Raises:
        ConfigError: No such file, or no question in it.
        DataError: Lines that are no questions.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: words may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError.at(
            str(path), f"cannot be read ({error})", "give a file of questions, one in each line"
        ) from error
    questions: list[ImageQuestion] = []
    faults: list[Fault] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            fields = json.loads(line)
            problem = _problem(fields)
        except ValueError as error:
            problem = f"is not JSON ({error})"
        if problem:
            faults.append(Fault(where, problem, 'write {"question_id": 1, "image": "a.png", "text": "Who?"}'))
        else:
            questions.append(
                ImageQuestion(len(questions), where, fields["question_id"], fields["text"], fields.get("image") or None)
            )
    if faults:
        raise DataError("\n".join(map(str, faults[:_SHOWN])), faults)
    if not questions:
        raise ConfigError.at(str(path), "holds no question", "give a file of questions, one in each line")
    return questions


def _problem(fields: Any) -> str | None:
    if not isinstance(fields, dict):
        return "is not a JSON object"
    if "question_id" not in fields:
        return "has no question_id"
    if not isinstance(fields.get("text"), str):
        return f"text is {fields.get('text')!r}, expected words"
    if not isinstance(fields.get("image"), str | None):
        return f"image is {fields['image']!r}, expected a path"
    return None


class AnswerJournal:
    """What a run has done so far, in a hidden folder beside the answers' file. Each process writes a file of its own.

    Args:
        answers: The answers' file.
        rank: This process's number.
    """

    def __init__(self, answers: Path, rank: int) -> None:
        self.folder = answers.with_name(f".{answers.name}.parts")
        self._path = self.folder / f"part-{rank:05d}.jsonl"
        self._settings = self.folder / "settings.json"

    @property
    def begun(self) -> bool:
        """Whether a run left something to go on with."""
        return self._settings.is_file()

    def begin(self, settings: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]] = ()) -> None:
        """Begins a run, or checks that the one to go on with was the same. For one process.

        Args:
            settings: What the answers depend on, plain enough for JSON.
            earlier: Entries that a run which begins has already.

        Raises:
            ConfigError: It was another run.
        """
        if not self.begun:
            shutil.rmtree(self.folder, ignore_errors=True)  # what was being removed when a run was killed
            write_text(self._path, "".join(json.dumps(entry) + "\n" for entry in earlier))
            write_json(self._settings, settings)  # last: without it the run has not begun
            return
        try:
            left = json.loads(self._settings.read_text(encoding="utf-8"))
        except ValueError:
            left = {}
        differing = sorted(name for name in {*settings, *left} if settings.get(name) != left.get(name))
        if differing:
            raise ConfigError.at(
                str(self.folder),
                f"is of an unfinished run with other settings ({', '.join(differing)})",
                "repeat that run's settings to go on with it, or remove the folder",
            )

    def read(self) -> dict[int, dict[str, Any]]:
        """What all processes have done: by the question's place ``{"text": ...}`` or ``{"skipped": why}``."""
        done: dict[int, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("part-*.jsonl")):
            for line in _whole_lines(path.read_bytes()):
                entry = json.loads(line)
                done[entry["place"]] = entry
        return done

    def __enter__(self) -> Self:
        """Open this process's file, a half line that a killed run left cut off."""
        if self._path.is_file():
            data = self._path.read_bytes()
            os.truncate(self._path, data.rfind(b"\n") + 1)
        self._file = self._path.open("ab")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self._file.close()

    def write(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Add what has been done; it is on the disk when this returns."""
        if entries:
            self._file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder)


def _whole_lines(data: bytes) -> Iterator[bytes]:
    yield from data[: data.rfind(b"\n") + 1].splitlines()


def write_answer_file(
    path: Path, questions: Sequence[ImageQuestion], done: Mapping[int, Mapping[str, Any]], model: str
) -> int:
    """Write the answers' file, whole or not at all, in the order of the questions.

    Args:
        path: The file.
        questions: All of them.
        done: From ``AnswerJournal.read``.
        model: The ``model_id``.

    Returns:
        The number of answers; questions that were skipped have none.
    """
    lines = []
    for question in questions:
        if "text" in done[question.place]:
            answer = {
                "question_id": question.id,
                "prompt": question.text,
                "text": done[question.place]["text"],
                # The original's is random. This one makes the same run give the same file.
                "answer_id": str(uuid.uuid5(_NAMESPACE, json.dumps([model, question.place, question.id]))),
                "model_id": model,
                "metadata": {},
            }
            lines.append(json.dumps(answer, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
    return len(lines)


def earlier_answers(path: Path, questions: Sequence[ImageQuestion], model: str) -> list[dict[str, Any]]:
    """Read an answers' file that is there already: a finished one, or one that the original left unfinished.

    Args:
        path: The file; a last line that was cut off is passed over.
        questions: What it should answer, in their order; some may be missing.
        model: The ``model_id`` that answers have to bear.

    Returns:
        Its answers, as ``AnswerJournal`` holds them.

    Raises:
        ConfigError: It answers other questions, or another model answered them.
    """
    *whole, rest = path.read_text(encoding="utf-8").split("\n")
    remaining = iter(questions)
    entries = []
    for number, line in enumerate([*whole, rest], start=1):
        if not line:
            continue
        try:
            answered = json.loads(line)
            asked, by, text = (answered["question_id"], answered["prompt"]), answered["model_id"], answered["text"]
        except (ValueError, TypeError, KeyError):
            if number > len(whole):
                continue
            asked, by, text = None, model, None
        found = next((one for one in remaining if (one.id, one.text) == asked), None)
        if found is None or by != model:
            what = "is no answer to these questions" if found is None else f"is an answer of {by!r}, expected {model!r}"
            raise ConfigError.at(f"{path}:{number}", f"is there already, and {what}", "name another file, or remove it")
        entries.append({"place": found.place, "text": text})
    return entries
