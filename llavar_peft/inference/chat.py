"""``load_chat``: a model that answers questions, at once or piece by piece, and holds conversations."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING

from llavar_peft.data.conversation_template import Content
from llavar_peft.inference.batch_decoder import Row, answer_all, stream_row
from llavar_peft.inference.engine import Engine, load_engine
from llavar_peft.inference.generation_request import (
    Answer,
    Prefix,
    PromptImage,
    Request,
    encode_messages,
)
from llavar_peft.inference.token_sampling import Sampling, SamplingSettings
from llavar_peft.recipe.schema import Attention, Dtype, Kernels, Quantization
from llavar_peft.text_files import check_question
from llavar_peft.types import ImageMode, Role, expand_home

if TYPE_CHECKING:
    from PIL.Image import Image
    from typing_extensions import Unpack


def load_chat(
    model: str | Path,
    adapter: str | Path | Mapping[str, str | Path] | None = None,
    *,
    quantize: Quantization | None = None,
    device: str = "auto",
    dtype: Dtype = "auto",
    vision_tower: str | None = None,
    attention: Attention = "auto",
    kernels: Kernels = "none",
) -> Chat:
    """Load a model that answers questions.

    Args:
        model: Folder of a checkpoint (ours or in the released layout), of an adapter (its base is loaded too), or of a
            run (its result is loaded).
        adapter: Folder of an adapter to apply to ``model``; or several by name, of which each call chooses one.
        quantize: How the language model's linear layers are stored; None stores an adapter's base as in its training.
            With ``int8``, the other rows of a batch can change the logits slightly (bitsandbytes' outlier columns).
        device: ``auto`` is a GPU if available, else Apple's GPU (unless quantized), else the CPU.
        dtype: Type of the weights; ``auto`` is the 16-bit format that suits the GPU, without a GPU float32.
        vision_tower: Folder or name of the tower, for a checkpoint in the released layout.
        attention: Implementation of attention.
        kernels: Kernels of the language model's layers, as in ``ModelConfig``.

    Raises:
        ConfigError: The folder holds no model, or the base of the adapter is missing.
        WeightsError: The weights do not fit the model.
    """
    if adapter is None:
        adapters: Mapping[str, str | Path] = {}
    else:
        adapters = adapter if isinstance(adapter, Mapping) else {expand_home(adapter).resolve().name: adapter}
    engine = load_engine(
        model,
        adapters,
        vision_tower=vision_tower,
        quantize=quantize,
        dtype=dtype,
        attention=attention,
        kernels=kernels,
        device=device,
    )
    return Chat(engine)


class Chat:
    """A model that answers questions. The default sampling is ``run_llava``'s (temperature 0.2); 0 is greedy."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def adapters(self) -> tuple[str, ...]:
        """The valid values of ``adapter`` in addition to None."""
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
        """Answer one question.

        Args:
            image: An image or a local path; None asks without an image.
            question: Plain text; nothing in it becomes a special token.
            adapter: Name of the adapter, None for the base; the default is the first adapter.
            image_mode: Overrides how the model prepares images.
            **sampling: Fields of ``Sampling``.

        Raises:
            ImageError: The image is missing or broken.
            ConfigError: The adapter does not exist, or a value is out of its range.
            DataError: The question is empty, or longer than the model's context.
        """
        check_question(question)
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
        """Answer one question piece by piece. The arguments are those of ``ask``.

        Yields:
            Pieces of text in whole characters. Closing the iterator ends the answer.
        """
        check_question(question)
        request = self.request(image, question, adapter=adapter, image_mode=image_mode, sampling=Sampling(**sampling))
        pieces: list[str] = []
        yield from stream_row(self.engine, Row(request, self.engine, pieces.append), pieces)

    def conversation(
        self, image: Image | str | Path | None = None, *, adapter: str | EllipsisType | None = ...
    ) -> Dialogue:
        """Start a conversation, which remembers earlier turns.

        Args:
            image: The image of the first question; later turns can add others.
            adapter: Name of the adapter, None for the base; the default is the first adapter.
        """
        return Dialogue(self.engine, image, adapter=self.resolve_adapter(adapter))

    def request(
        self,
        image: Image | str | Path | None,
        question: str,
        *,
        adapter: str | EllipsisType | None = ...,
        image_mode: ImageMode | None = None,
        sampling: Sampling | None = None,
    ) -> Request:
        """Prepare a question for ``answer``. The arguments are those of ``ask``."""
        images = [] if image is None else [PromptImage.prepare(image, self.engine.processor, image_mode)]
        content = self.engine.processor.conversation_template.question(question, len(images))
        return Request(
            ids=encode_messages(self.engine.processor, [("human", content)], images),
            images=images,
            sampling=sampling or Sampling(),
            adapter=self.resolve_adapter(adapter),
        )

    def answer(self, requests: Sequence[Request], *, batch_size: int = 32) -> list[Answer]:
        """Answer many questions in batches.

        Args:
            requests: Made by ``request``; neighbours with the same adapter form a batch.
            batch_size: Maximum number of questions that are answered at a time.
        """
        return answer_all(self.engine, requests, batch_size=batch_size)

    def resolve_adapter(self, adapter: str | EllipsisType | None) -> str | None:
        """Return the adapter that a call refers to: the named one, None for the base, the first for ``...``."""
        if isinstance(adapter, EllipsisType):
            return self.adapters[0] if self.adapters else None
        self.engine.check_adapter(adapter)
        return adapter


@dataclass(frozen=True, slots=True)
class DialogueReply:
    """A question with its image, and the model's answer."""

    question: str
    image: PromptImage | None
    answer: str


class Dialogue:
    """A conversation that keeps what was computed for earlier turns.

    Kept are the features of the images, and the keys and values of all tokens that the next prompt begins with.

    Args:
        engine: The engine that answers.
        image: The image of the first question.
        adapter: Name of the adapter, None for the base.

    Attributes:
        adapter: Name of the adapter; may be changed between turns.
        turns: The questions and answers so far.
    """

    def __init__(self, engine: Engine, image: Image | str | Path | None = None, *, adapter: str | None = None) -> None:
        self.adapter = adapter
        self.turns: list[DialogueReply] = []
        self._engine = engine
        self._next_image: PromptImage | None = None
        self._prefix: Prefix | None = None
        self._prefix_adapter: str | None = None
        if image is not None:
            self.show(image)

    def show(self, image: Image | str | Path, image_mode: ImageMode | None = None) -> None:
        """Add an image to the next question.

        Args:
            image: An image or a local path.
            image_mode: Overrides how the model prepares images.

        Raises:
            ImageError: The image is missing or broken.
        """
        self._next_image = PromptImage.prepare(image, self._engine.processor, image_mode)

    def clear(self) -> None:
        """Remove all turns and images."""
        self.turns.clear()
        self._next_image = self._prefix = None

    def send(self, text: str, image: Image | str | Path | None = None, **sampling: Unpack[SamplingSettings]) -> str:
        """Send a message and return the answer.

        Args:
            text: Plain text; nothing in it becomes a special token.
            image: An image to add to the message.
            **sampling: Fields of ``Sampling``.

        Raises:
            ImageError: The image is missing or broken.
            DataError: The message is empty, or the conversation is longer than the model's context.
        """
        return "".join(self.stream(text, image, **sampling))

    def stream(
        self, text: str, image: Image | str | Path | None = None, **sampling: Unpack[SamplingSettings]
    ) -> Generator[str, None, None]:
        """Send a message and yield the answer piece by piece. The arguments are those of ``send``.

        If the iterator is closed or an exception interrupts it, the turn keeps the answer so far.
        """
        if image is not None:
            self.show(image)
        shown = self._next_image
        pieces: list[str] = []
        row = Row(self._request(text, shown, Sampling(**sampling)), self._engine, pieces.append)
        try:
            yield from stream_row(self._engine, row, pieces)
        finally:
            if row.text or (row.answer is not None and row.answer.finish_reason != "cancelled"):
                self.turns.append(DialogueReply(text, shown, row.text))
                self._next_image = None
            # Without an answer the step was interrupted; the keys and values of the earlier turns are still valid.
            if row.answer is not None:
                self._prefix, self._prefix_adapter = row.answer.prefix, row.request.adapter

    def _request(self, text: str, image: PromptImage | None, sampling: Sampling) -> Request:
        ask = self._engine.processor.conversation_template.question
        check_question(text)
        messages: list[tuple[Role, Content]] = []
        for turn in self.turns:
            messages += [("human", ask(turn.question, int(turn.image is not None))), ("gpt", [turn.answer])]
        messages.append(("human", ask(text, int(image is not None))))
        images = [shown for shown in (*(turn.image for turn in self.turns), image) if shown is not None]
        ids = encode_messages(self._engine.processor, messages, images)
        prefix = self._prefix if self._prefix_adapter == self.adapter else None
        if prefix is not None:
            prefix = prefix.shared_with(ids, images, self._engine.processor.image_token_id)
        return Request(ids=ids, images=images, sampling=sampling, adapter=self.adapter, prefix=prefix, keep_prefix=True)
