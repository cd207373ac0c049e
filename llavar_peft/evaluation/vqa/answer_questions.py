"""Asking a model a whole data set, in batches, so that a run that was killed goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llavar_peft.atomic_files import dump_json, write_text
from llavar_peft.errors import ConfigError, DataError, Fault, ImageError
from llavar_peft.evaluation.vqa.scored_results import Setting
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion

if TYPE_CHECKING:
    from llavar_peft.data.image_preparation import ImageRoots
    from llavar_peft.inference.chat import Chat

QUESTION_PLACE: Final = "{question}"
"""Where the question stands in a prompt."""
_SHOWN: Final = 5


def answer_questions(
    chat: Chat,
    questions: Sequence[VqaQuestion],
    roots: ImageRoots,
    setting: Setting,
    log: Path,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[VqaQuestion, ...]:
    """Ask a model every question, and keeps each batch of answers on disk as soon as it is there.

    Args:
        chat: The model.
        questions: What to ask, in this order.
        roots: Where the images are.
        setting: With prompt, image mode, temperature, batch size and length.
        log: JSON lines: the setting, then an answer each. Answers that are there, of the same questions in the same
            setting, are not asked for again; sampled ones come out as if the run had not been interrupted.
        progress: Called with (questions done, questions in all).

    Returns:
        The questions with their answers.

    Raises:
        ConfigError: The log is of another setting or other questions, or the setting lacks something.
        ImageError: An image is missing, broken, or outside its folder.
        DataError: The log is damaged.
    """
    prompt, size, tokens = setting.prompt, setting.batch_size, setting.max_new_tokens
    if prompt is None or QUESTION_PLACE not in prompt:
        raise ConfigError.at("prompt", f"has no {QUESTION_PLACE} (got {prompt!r})", f"write {QUESTION_PLACE} in it")
    if size is None or size < 1 or tokens is None:
        raise ConfigError.at("batch_size", "the setting lacks it, or max_new_tokens", "give both")
    _check_images(questions, roots)
    answers = _resume(log, _header(questions, setting), size, len(questions))
    for start in range(len(answers), len(questions), size):
        if progress is not None:
            progress(start, len(questions))
        batch = questions[start : start + size]
        answered = _ask(chat, batch, roots, setting, start)
        lines = [
            {
                "id": one.id,
                "question": one.question,
                "answer": answer,
                "gt_answers": one.truths,
                "image_path": one.image,
            }
            for one, answer in zip(batch, answered, strict=True)
        ]
        with log.open("a", encoding="utf-8") as file:
            file.write("".join(dump_json(line) + "\n" for line in lines))
        answers += answered
    if progress is not None:
        progress(len(questions), len(questions))
    return tuple(replace(question, answer=answer) for question, answer in zip(questions, answers, strict=True))


def _ask(chat: Chat, batch: Sequence[VqaQuestion], roots: ImageRoots, setting: Setting, start: int) -> list[str]:
    from llavar_peft.inference.token_sampling import Sampling

    requests = [
        chat.request(
            None if question.image is None else roots.open(question.image),
            str(setting.prompt).replace(QUESTION_PLACE, question.question),
            image_mode=setting.image_mode,
            sampling=Sampling(
                max_new_tokens=int(setting.max_new_tokens or 0),
                temperature=setting.temperature or 0.0,
                top_k=setting.top_k or 0,
                # The seed depends on the question's index only, so a resumed run gives the same answers.
                seed=None if setting.seed is None else (setting.seed + index) % 2**63,
            ),
        )
        for index, question in enumerate(batch, start)
    ]
    return [answer.text for answer in chat.answer(requests, batch_size=len(batch))]


def _check_images(questions: Sequence[VqaQuestion], roots: ImageRoots) -> None:
    """Find what is missing before a GPU waits for it."""
    faults: list[Fault] = []
    for path in dict.fromkeys(question.image for question in questions):
        if path is None:
            continue
        try:
            roots.resolve(path, guess=len(faults) < _SHOWN)
        except ImageError as error:
            faults += error.faults
    if faults:
        more = f"\nand {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ImageError("\n".join(str(fault) for fault in faults[:_SHOWN]) + more, faults)


def _header(questions: Sequence[VqaQuestion], setting: Setting) -> dict[str, Any]:
    asked = hashlib.sha256()
    for question in questions:
        asked.update(json.dumps([question.id, question.question, question.image]).encode())
    # Where the model lies does not matter, what it is does; nor does a batch where nothing is drawn.
    leave_out = {"model"} if setting.temperature else {"model", "seed", "batch_size", "top_k"}
    how = {key: value for key, value in asdict(setting).items() if key not in leave_out}
    return {"setting": how, "questions": asked.hexdigest()[:16]}  # the keys are question_files.LOG_HEADER


def _resume(log: Path, header: dict[str, Any], batch_size: int, total: int) -> list[str]:
    """Return the answers of whole batches; what follows them, written half or not needed, is dropped."""
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    lines = text.split("\n")[:-1]
    if not lines:
        log.parent.mkdir(parents=True, exist_ok=True)
        write_text(log, json.dumps(header) + "\n")
        return []
    found = _decoded(lines[0], log, 1)
    if found != header:
        raise ConfigError.at(
            str(log),
            f"holds answers that were got otherwise ({_difference(found, header)})",
            "give another --out, or delete this file to ask again",
        )
    whole = len(lines) - 1 if len(lines) - 1 == total else (len(lines) - 1) // batch_size * batch_size
    answers = [_decoded(line, log, number) for number, line in enumerate(lines[1 : 1 + whole], 2)]
    write_text(log, "".join(line + "\n" for line in lines[: 1 + whole]))
    return [str(answer["answer"]) for answer in answers]


def _decoded(line: str, log: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError.at(f"{log}:{number}", f"is not JSON ({error})", "delete the file to ask again") from error
    if not isinstance(value, dict) or not {"answer", "setting"} & set(value):
        raise DataError.at(f"{log}:{number}", "is no answer", "delete the file to ask again")
    return value


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    ours, theirs = expected["setting"], found.get("setting")
    if not isinstance(theirs, dict):
        return "it is another file"
    changed = [f"{key}: {theirs.get(key)!r}, now {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]
    return "; ".join(changed) or "other questions"
