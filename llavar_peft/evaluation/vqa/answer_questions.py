"""Ask a model the questions of a data set in batches, with a journal from which an interrupted run resumes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llavar_peft.data.resume_journal import ResumeJournal
from llavar_peft.errors import ConfigError, DataError, Fault, ImageError
from llavar_peft.evaluation.vqa.scored_results import Setting
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion

if TYPE_CHECKING:
    from PIL.Image import Image

    from llavar_peft.data.image_roots import ImageRoots
    from llavar_peft.data.json_schema import AnswerSchema
    from llavar_peft.data.letter_canvas import LetterCanvas
    from llavar_peft.inference.chat import Chat

QUESTION_PLACE: Final = "{question}"
"""Placeholder of the question in a prompt."""
_SHOWN: Final = 5


def answer_questions(
    chat: Chat,
    questions: Sequence[VqaQuestion],
    roots: ImageRoots,
    setting: Setting,
    log: Path,
    progress: Callable[[int, int], None] | None = None,
    canvases: Mapping[str, LetterCanvas] | None = None,
    schema: AnswerSchema | None = None,
) -> tuple[VqaQuestion, ...]:
    """Ask a model every question and append each batch of answers to a journal.

    Args:
        chat: The model.
        questions: What to ask, in this order.
        roots: Where the images are.
        setting: With prompt, image mode, temperature, batch size and length.
        log: The journal: the setting, then one answer per line. Its answers are not asked for again; sampled answers
            are those of an uninterrupted run.
        progress: Called with the number of questions done and in total.
        canvases: How the image of a question is shown, by the question's id; None shows it as it is.
        schema: What the answers have to follow; None leaves them free.

    Returns:
        The questions with their answers.

    Raises:
        ConfigError: The journal has other settings or other questions, or the setting is incomplete.
        ImageError: An image is missing, broken, or outside its folder.
        DataError: The journal is damaged.
    """
    prompt, size, tokens = setting.prompt, setting.batch_size, setting.max_new_tokens
    if prompt is None or QUESTION_PLACE not in prompt:
        raise ConfigError.at("prompt", f"has no {QUESTION_PLACE} (got {prompt!r})", f"put {QUESTION_PLACE} into it")
    if size is None or size < 1 or tokens is None:
        raise ConfigError.at("batch_size", "it or max_new_tokens is not set", "set both")
    check_images(questions, roots)
    heading = _heading(chat, questions, setting, canvases)
    if schema is not None:
        heading["setting"]["schema"] = schema.text
    with ResumeJournal(log, heading) as journal:
        answers = _read_answers(journal, size, len(questions))
        for start in range(len(answers), len(questions), size):
            if progress is not None:
                progress(start, len(questions))
            batch = questions[start : start + size]
            answered = _ask(chat, batch, roots, setting, start, canvases or {}, schema)
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
            journal.append(*lines)
            answers += answered
    if progress is not None:
        progress(len(questions), len(questions))
    return tuple(replace(question, answer=answer) for question, answer in zip(questions, answers, strict=True))


def _ask(
    chat: Chat,
    batch: Sequence[VqaQuestion],
    roots: ImageRoots,
    setting: Setting,
    start: int,
    canvases: Mapping[str, LetterCanvas],
    schema: AnswerSchema | None,
) -> list[str]:
    from llavar_peft.inference.token_sampling import Sampling

    def show(question: VqaQuestion) -> Image | None:
        image = None if question.image is None else roots.open(question.image)
        canvas = canvases.get(question.id)
        return image if image is None or canvas is None else canvas.show(image)

    requests = [
        chat.request(
            show(question),
            str(setting.prompt).replace(QUESTION_PLACE, question.question),
            image_mode=setting.image_mode,
            schema=schema,
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


def check_images(questions: Sequence[VqaQuestion], roots: ImageRoots) -> None:
    """Check that all images exist before any question is asked. Raises ``ImageError``."""
    faults: list[Fault] = []
    for path in dict.fromkeys(question.image for question in questions):
        if path is None:
            continue
        try:
            roots.resolve(path, guess=len(faults) < _SHOWN)
        except ImageError as error:
            faults += error.faults
    if faults and not roots.roots:
        what = f"not given, and {len(faults)} of {len(questions)} questions name an image"
        raise ImageError.at("--images", what, "give the folder that the image paths start from")
    if faults:
        more = f"\nand {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ImageError("\n".join(str(fault) for fault in faults[:_SHOWN]) + more, faults)


def _heading(
    chat: Chat, questions: Sequence[VqaQuestion], setting: Setting, canvases: Mapping[str, LetterCanvas] | None
) -> dict[str, Any]:
    digest = hashlib.sha256()
    for question in questions:
        digest.update(json.dumps([question.id, question.question, question.image]).encode())
        if canvases is not None and question.id in canvases:
            digest.update(json.dumps(asdict(canvases[question.id])).encode())
    # The model is identified by its hash, not its path; greedy answers do not depend on seed and batch size.
    left_out = {"model"} if setting.temperature else {"model", "seed", "batch_size", "top_k"}
    settings = {key: value for key, value in asdict(setting).items() if key not in left_out}
    # Equal weights answer differently in 4 bits, or at another resolution.
    settings |= {"quantize": chat.engine.quantize, "resolution": chat.engine.processor.resolution}
    return {"setting": settings, "questions": digest.hexdigest()[:16]}  # the keys are benchmark_files.LOG_HEADER


def _read_answers(journal: ResumeJournal, batch_size: int, total: int) -> list[str]:
    """Return the answers of complete batches, and remove what follows them from the journal."""
    entries = list(journal.entries())
    kept = len(entries) if len(entries) == total else len(entries) // batch_size * batch_size
    if kept < len(entries):
        journal.truncate(entries[kept][0])
    for number, (_, entry) in enumerate(entries[:kept], 2):
        if "answer" not in entry:
            raise DataError.at(f"{journal.path}:{number}", "is not an answer", "delete the file, and run again")
    return [str(entry["answer"]) for _, entry in entries[:kept]]
