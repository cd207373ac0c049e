"""``load_chat``: a model to ask, to stream from, and to talk with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING

from llavar_peft.inference.batch_decoder import Row, answer_all, stream_row
from llavar_peft.inference.dialogue import Dialogue
from llavar_peft.inference.engine import Engine
from llavar_peft.inference.generation_request import (
    Answer,
    PromptImage,
    Request,
    Sampling,
    SamplingSettings,
    encode_messages,
    question_content,
)
from llavar_peft.inference.open_engine import open_engine
from llavar_peft.recipe.schema import Attention, Dtype, Quantization
from llavar_peft.types import ImageMode

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
) -> Chat:
    """Open a model to ask.

    Args:
        model: A checkpoint's folder, ours or in the released layout; an adapter's, whose base is then opened; or a
            run's, which stands for its result.
        adapter: An adapter's folder, laid over ``model``; or several by name, of which each call chooses one.
        quantize: How the language model's linear layers are stored; None leaves an adapter's base as it was trained on.
            With ``int8``, what else is in a batch can change an answer's logits a little (bitsandbytes' outliers).
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
        """Ask one question.

        Args:
            image: An image or a local path; None asks without one.
            question: In plain words; nothing in it is ever a special token.
            adapter: Which one answers, None for the base; by default the first.
            image_mode: Overrides the model's own way of preparing images.
            **sampling: Fields of ``Sampling``.

        Returns:
            The answer.

        Raises:
            ImageError: The image is missing or broken.
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
        """Ask as ``ask`` does, and gives the answer out as it comes, in whole characters.

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
        yield from stream_row(self.engine, Row(request, self.engine, pieces.append), pieces)

    def conversation(
        self, image: Image | str | Path | None = None, *, adapter: str | EllipsisType | None = ...
    ) -> Dialogue:
        """Begins a conversation, which remembers what was said and seen.

        Args:
            image: The image it is about, if there is one; later turns can bring others.
            adapter: Which one answers, None for the base; by default the first.

        Returns:
            The conversation.
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
        """Prepare a question for ``answer``; the arguments are those of ``ask``."""
        shown = [] if image is None else [PromptImage.prepare(image, self.engine.processor, image_mode)]
        content = question_content(question, shown[0] if shown else None)
        return Request(
            ids=encode_messages(self.engine.processor, [("human", content)], shown),
            images=shown,
            sampling=sampling or Sampling(),
            adapter=self.resolve_adapter(adapter),
        )

    def answer(self, requests: Sequence[Request], *, batch_size: int = 32) -> list[Answer]:
        """Answer many questions, in batches.

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
