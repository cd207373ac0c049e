"""A conversation that keeps what was computed for it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llavar_peft.data.conversation_template import Content
from llavar_peft.inference.batch_decoder import Row, stream_row
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.generation_request import (
    Prefix,
    PromptImage,
    Request,
    Sampling,
    SamplingSettings,
    encode_messages,
    question_content,
)
from llavar_peft.types import ImageMode, Role

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Unpack


@dataclass(frozen=True, slots=True)
class DialogueReply:
    """A question and its answer.

    Attributes:
        question: The user's words.
        image: What came with them.
        answer: The model's words.
    """

    question: str
    image: PromptImage | None
    answer: str


class Dialogue:
    """A conversation with memory.

    What has been computed for the turns before is kept and not computed again: the images' features, and the keys and
    values of every token that the next prompt shares with what was said.

    Args:
        engine: Who answers.
        image: The image that comes with the first question.
        adapter: Which adapter answers, None for the base.

    Attributes:
        adapter: The adapter's name; may be changed between turns.
        turns: What was said.
    """

    def __init__(self, engine: Engine, image: Image | str | Path | None = None, *, adapter: str | None = None) -> None:
        self.adapter = adapter
        self.turns: list[DialogueReply] = []
        self._engine = engine
        self._waiting: PromptImage | None = None
        self._prefix: Prefix | None = None
        self._prefix_of: str | None = None
        if image is not None:
            self.show(image)

    def show(self, image: Image | str | Path, image_mode: ImageMode | None = None) -> None:
        """Apply an image beside the next question.

        Args:
            image: An image or a local path.
            image_mode: Overrides the model's own way of preparing images.

        Raises:
            ImageError: It is missing or broken.
        """
        self._waiting = PromptImage.prepare(image, self._engine.processor, image_mode)

    def clear(self) -> None:
        """Forget what was said and shown."""
        self.turns.clear()
        self._waiting = self._prefix = None

    def send(self, text: str, image: Image | str | Path | None = None, **sampling: Unpack[SamplingSettings]) -> str:
        """Say something and waits for the answer.

        Args:
            text: In plain words; nothing in it is ever a special token.
            image: An image that comes with them.
            **sampling: Fields of ``Sampling``.

        Returns:
            The answer.

        Raises:
            ImageError: The image is missing or broken.
            DataError: The conversation has become longer than the model's context.
        """
        return "".join(self.stream(text, image, **sampling))

    def stream(
        self, text: str, image: Image | str | Path | None = None, **sampling: Unpack[SamplingSettings]
    ) -> Generator[str, None, None]:
        """Say something and gives the answer out as it comes.

        An answer that is broken off, by nobody taking more of it or by an interrupt, is remembered as far as it came.

        Args:
            text: As in ``send``.
            image: As in ``send``.
            **sampling: Fields of ``Sampling``.

        Yields:
            Pieces, in whole characters; joined, they are the answer.
        """
        if image is not None:
            self.show(image)
        opened = self._waiting
        pieces: list[str] = []
        row = Row(self._request(text, opened, Sampling(**sampling)), self._engine, pieces.append)
        try:
            yield from stream_row(self._engine, row, pieces)
        finally:
            if row.text or (row.answer is not None and row.answer.finish_reason != "cancelled"):
                self.turns.append(DialogueReply(text, opened, row.text))
                self._waiting = None
            # Without an answer the batch was left in the middle of a step; the keys and values of before still hold.
            if row.answer is not None:
                self._prefix, self._prefix_of = row.answer.prefix, row.request.adapter

    def _request(self, text: str, image: PromptImage | None, sampling: Sampling) -> Request:
        messages: list[tuple[Role, Content]] = []
        for said in self.turns:
            messages += [("human", question_content(said.question, said.image)), ("gpt", [said.answer])]
        messages.append(("human", question_content(text, image)))
        shown = [seen for seen in (*(said.image for said in self.turns), image) if seen is not None]
        ids = encode_messages(self._engine.processor, messages, shown)
        prefix = self._prefix if self._prefix_of == self.adapter else None
        if prefix is not None:
            prefix = prefix.shared_with(ids, shown, self._engine.processor.image_token_id)
        return Request(ids=ids, images=shown, sampling=sampling, adapter=self.adapter, prefix=prefix, keep_prefix=True)
