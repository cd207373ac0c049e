"""``load_chat``: a model to ask, to stream from, and to talk with."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING

from typing_extensions import Unpack

from llavar_peft.config import Attention, Dtype, Quantization
from llavar_peft.data.template import Content
from llavar_peft.inference.decode import Batch, Row, answer_all
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.loading import open_engine
from llavar_peft.inference.requests import (
    Answer,
    Picture,
    Prefix,
    Request,
    Sampling,
    SamplingSettings,
    encode_messages,
)
from llavar_peft.types import ImageMode, Role

if TYPE_CHECKING:
    from PIL.Image import Image


def load_chat(
    model: str | Path,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    *,
    quantize: Quantization | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    vision_tower: str | None = None,
    attention: Attention = "auto",
) -> Chat:
    """Opens a model to ask.

    Args:
        model: A checkpoint's folder, ours or in the released layout; an adapter's, whose base is then opened; or a
            run's, which stands for its result.
        adapter: An adapter's folder, laid over ``model``; or several by name, of which each call chooses one.
        quantize: How the language model's linear layers are stored; None leaves an adapter's base as it was trained on.
        device: ``auto`` is a GPU where there is one, then Apple's (not quantized), then the CPU.
        dtype: Of the weights; ``auto`` is bfloat16 on a GPU that has it, else float32.
        vision_tower: Where the tower is, for a checkpoint in the released layout.
        attention: Its implementation.

    Returns:
        The model, ready.

    Raises:
        ConfigError: The folder holds no model, or names a base that is not there.
        WeightsError: Weights that do not fit.
    """
    if adapter is None:
        adapters: Mapping[str, str | Path] = {}
    else:
        adapters = adapter if isinstance(adapter, Mapping) else {Path(adapter).name: adapter}
    engine = open_engine(
        model,
        adapters,
        vision_tower=vision_tower,
        quantize=quantize,
        dtype=dtype,
        attention=attention,
        device=device,
    )
    return Chat(engine)


class Chat:
    """A model to ask. Sampling is ``run_llava``'s by default (temperature 0.2); ``temperature=0`` is greedy.

    Args:
        engine: The model with its adapters.

    Attributes:
        engine: As given.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names that ``adapter`` can have, besides None."""
        return self.engine.adapters

    def ask(
        self,
        image: Image | str | Path | None,
        question: str,
        *,
        adapter: str | EllipsisType | None = ...,
        image_mode: ImageMode | None = None,
        **sampling: Unpack[SamplingSettings],
    ) -> str:
        """Asks one question.

        Args:
            image: A picture or a local path; None asks without one.
            question: In plain words; nothing in it is ever a special token.
            adapter: Which one answers, None for the base; by default the first.
            image_mode: Overrides the model's own way of preparing pictures.
            **sampling: Fields of ``Sampling``.

        Returns:
            The answer.

        Raises:
            ImageError: The picture is missing or broken.
            ConfigError: There is no such adapter, or a value is out of its range.
            DataError: The question is longer than the model's context.
        """
        request = self.request(image, question, adapter=adapter, image_mode=image_mode, sampling=Sampling(**sampling))
        return self.answer([request])[0].text

    def stream(
        self,
        image: Image | str | Path | None,
        question: str,
        *,
        adapter: str | EllipsisType | None = ...,
        image_mode: ImageMode | None = None,
        **sampling: Unpack[SamplingSettings],
    ) -> Iterator[str]:
        """Asks as ``ask`` does, and gives the answer out as it comes, in whole characters.

        Args:
            image: As in ``ask``.
            question: As in ``ask``.
            adapter: As in ``ask``.
            image_mode: As in ``ask``.
            **sampling: Fields of ``Sampling``.

        Yields:
            Pieces; joined, they are the answer. Nobody taking more of them ends it.
        """
        request = self.request(image, question, adapter=adapter, image_mode=image_mode, sampling=Sampling(**sampling))
        pieces: list[str] = []
        yield from _pieces(self.engine, Row(request, self.engine, pieces.append), pieces)

    def conversation(
        self, image: Image | str | Path | None = None, *, adapter: str | EllipsisType | None = ...
    ) -> Dialogue:
        """Begins a conversation, which remembers what was said and seen.

        Args:
            image: The picture it is about, if there is one; later turns can bring others.
            adapter: Which one answers, None for the base; by default the first.

        Returns:
            The conversation.
        """
        return Dialogue(self, image, adapter=adapter)

    def request(
        self,
        image: Image | str | Path | None,
        question: str,
        *,
        adapter: str | EllipsisType | None = ...,
        image_mode: ImageMode | None = None,
        sampling: Sampling | None = None,
    ) -> Request:
        """Prepares a question for ``answer``; the arguments are those of ``ask``."""
        shown = [] if image is None else [Picture.prepare(image, self.engine.processor, image_mode)]
        content: Content = [f"{question}\n", None] if shown else [question]
        return Request(
            ids=encode_messages(self.engine.processor, [("human", content)], shown),
            pictures=shown,
            sampling=sampling or Sampling(),
            adapter=self.resolve_adapter(adapter),
        )

    def answer(self, requests: Sequence[Request], *, batch_size: int = 32) -> list[Answer]:
        """Answers many questions, in batches.

        Args:
            requests: From ``request``; neighbours with the same adapter are batched.
            batch_size: Rows at most that are answered at a time.

        Returns:
            One answer for each.
        """
        return answer_all(self.engine, requests, batch_size=batch_size)

    def resolve_adapter(self, adapter: str | EllipsisType | None) -> str | None:
        """The adapter that a call means: the one it names, None for the base, or the first where it says nothing."""
        if isinstance(adapter, EllipsisType):
            return self.adapters[0] if self.adapters else None
        self.engine.check_adapter(adapter)
        return adapter


@dataclass(frozen=True, slots=True)
class Said:
    """A question and its answer.

    Attributes:
        question: The user's words.
        picture: What came with them.
        answer: The model's words.
    """

    question: str
    picture: Picture | None
    answer: str


class Dialogue:
    """A conversation with memory.

    What has been computed for the turns before is kept and not computed again: the pictures' features, and the keys and
    values of every token that the next prompt shares with what was said.

    Args:
        chat: Who answers.
        image: The picture that comes with the first question.
        adapter: Which adapter answers, None for the base; by default the first.

    Attributes:
        adapter: The adapter's name; may be changed between turns.
        turns: What was said.
    """

    def __init__(
        self, chat: Chat, image: Image | str | Path | None = None, *, adapter: str | EllipsisType | None = ...
    ) -> None:
        self.adapter = chat.resolve_adapter(adapter)
        self.turns: list[Said] = []
        self._engine = chat.engine
        self._waiting: Picture | None = None
        self._prefix: Prefix | None = None
        self._prefix_of: str | None = None
        if image is not None:
            self.show(image)

    def show(self, image: Image | str | Path, image_mode: ImageMode | None = None) -> None:
        """Lays a picture beside the next question.

        Args:
            image: A picture or a local path.
            image_mode: Overrides the model's own way of preparing pictures.

        Raises:
            ImageError: It is missing or broken.
        """
        self._waiting = Picture.prepare(image, self._engine.processor, image_mode)

    def clear(self) -> None:
        """Forgets what was said and shown."""
        self.turns.clear()
        self._waiting = self._prefix = None

    def send(self, text: str, image: Image | str | Path | None = None, **sampling: Unpack[SamplingSettings]) -> str:
        """Says something and waits for the answer.

        Args:
            text: In plain words; nothing in it is ever a special token.
            image: A picture that comes with them.
            **sampling: Fields of ``Sampling``.

        Returns:
            The answer.

        Raises:
            ImageError: The picture is missing or broken.
            DataError: The conversation has become longer than the model's context.
        """
        return "".join(self.stream(text, image, **sampling))

    def stream(
        self, text: str, image: Image | str | Path | None = None, **sampling: Unpack[SamplingSettings]
    ) -> Generator[str, None, None]:
        """Says something and gives the answer out as it comes.

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
        picture = self._waiting
        pieces: list[str] = []
        row = Row(self._request(text, picture, Sampling(**sampling)), self._engine, pieces.append)
        try:
            yield from _pieces(self._engine, row, pieces)
        finally:
            if row.text or (row.answer is not None and row.answer.finish_reason != "cancelled"):
                self.turns.append(Said(text, picture, row.text))
                self._waiting = None
            # Without an answer the batch was left in the middle of a step; the keys and values of before still hold.
            if row.answer is not None:
                self._prefix, self._prefix_of = row.answer.prefix, row.request.adapter

    def _request(self, text: str, picture: Picture | None, sampling: Sampling) -> Request:
        messages: list[tuple[Role, Content]] = []
        for said in self.turns:
            messages += [("human", _content(said.question, said.picture)), ("gpt", [said.answer])]
        messages.append(("human", _content(text, picture)))
        shown = [seen for seen in (*(said.picture for said in self.turns), picture) if seen is not None]
        ids = encode_messages(self._engine.processor, messages, shown)
        usable = self._prefix is not None and self._prefix_of == self.adapter
        return Request(
            ids=ids,
            pictures=shown,
            sampling=sampling,
            adapter=self.adapter,
            prefix=self._prefix.shared_with(ids) if self._prefix is not None and usable else None,
            keep_prefix=True,
        )


def _content(words: str, picture: Picture | None) -> Content:
    # Source: LLaVAR, llava/eval/run_llava.py: the question first, then a line break, then the picture.
    return [words] if picture is None else [f"{words}\n", None]


def _pieces(engine: Engine, row: Row, pieces: list[str]) -> Iterator[str]:
    """Answers a row, and gives out the pieces that it says."""
    batch = Batch(engine, row.request.adapter)
    try:
        batch.join([row])
        while batch.rows:
            yield from pieces
            pieces.clear()
            batch.step()
        yield from pieces
    except GeneratorExit:
        row.cancelled = True
        batch.step()
        raise
