"""An image's conversation in LLaVA's record format."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any, Protocol

from llavar_peft.constants import IMAGE_PLACEHOLDER, OCR_INSTRUCTIONS
from llavar_peft.datagen.synth.synth_settings import Task


class ImageContent(Protocol):
    """What a record needs to know of an image."""

    @property
    def transcript(self) -> str:
        """All text."""
        ...

    @property
    def questions(self) -> tuple[tuple[str, str], ...]:
        """Pairs of a question and its only right answer."""
        ...


def make_synth_record(image: ImageContent, name: str, task: Task, rng: Random) -> dict[str, Any]:
    """Write an image's conversation.

    Args:
        image: What is asked about.
        name: The image's file name, as the record gives it.
        task: ``transcribe``: all text, on one of ``OCR_INSTRUCTIONS`` (stage 1). ``question``: one of the image's
            questions. ``conversation``: all of them, in a random order, as turns of one conversation (stage 2).
        rng: Where the choices come from, among them whether the image stands before or after the first question.

    Returns:
        ``{"id", "image", "conversations"}``.
    """
    if task == "transcribe":
        pairs = [(rng.choice(OCR_INSTRUCTIONS), image.transcript)]
    else:
        pairs = rng.sample(image.questions, 1 if task == "question" else len(image.questions))
    first = rng.choice((IMAGE_PLACEHOLDER + "\n{}", "{}\n" + IMAGE_PLACEHOLDER)).format(pairs[0][0])
    turns = list[dict[str, str]]()
    for number, (question, answer) in enumerate(pairs):
        turns.append({"from": "human", "value": question if number else first})
        turns.append({"from": "gpt", "value": answer})
    return {"id": Path(name).stem, "image": name, "conversations": turns}
