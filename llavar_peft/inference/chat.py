"""``load_chat``: a model that answers questions, at once or piece by piece, and holds conversations."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeAlias

from llavar_peft.data.conversation_template import Content
from llavar_peft.data.json_schema import AnswerSchema
from llavar_peft.errors import ConfigError
from llavar_peft.inference.batch_decoder import Row, answer_all, stream_row
from llavar_peft.inference.engine import Engine, load_engine
from llavar_peft.inference.generation_request import (
    Answer,
    ImageInput,
    Prefix,
    PromptImage,
    Request,
    encode_messages,
    prepare_images,
)
from llavar_peft.inference.token_sampling import Sampling, SamplingSettings
from llavar_peft.recipe.schema import Attention, Dtype, Kernels
from llavar_peft.text_files import check_question
from llavar_peft.types import ImageMode, Quantization, ReadableRepr, Role

if TYPE_CHECKING:
    from pydantic import BaseModel
    from typing_extensions import Unpack

SchemaInput: TypeAlias = "Mapping[str, Any] | type[BaseModel] | AnswerSchema"
"""What an answer has to follow: a JSON Schema, or a pydantic model class."""


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
    adapters: Mapping[str, str | Path] = {}
    if isinstance(adapter, Mapping):
        adapters = adapter
    elif adapter is not None:
        adapters = {_adapter_name(adapter): adapter}
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


def _adapter_name(folder: object) -> str:
    if not isinstance(folder, str | Path):
        what = f"got {type(folder).__name__}, expected a folder, or a mapping of names to folders"
        raise ConfigError.at("adapter", what, 'write {"name": "folder", ...} for several')
    return Path(folder).name


def _stated_question(question: str | None, schema: SchemaInput | None) -> str:
    """Return the question, or without one that for the fields of the schema."""
    if question is None and schema is not None:
        return AnswerSchema.of(schema).question
    if question is None:
        raise ConfigError.at("question", "missing", "write a question, or give a schema to ask for its fields")
    check_question(question)
    return question


def parse_answer(text: str, schema: SchemaInput) -> Any:
    """Return the value of an answer that was asked for with a schema.

    Args:
        text: The answer.
        schema: As in ``Chat.ask``.

    Returns:
        An instance of the pydantic model, if the schema is one, else what the JSON says.

    Raises:
        DataError: The answer is not JSON, for example because it was too long for ``max_new_tokens``, or does not
            fulfil the schema.
    """
    return AnswerSchema.of(schema).parse(text)


class Chat:
    """A model that answers questions. The default sampling is ``run_llava``'s (temperature 0.2); 0 is greedy."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __repr__(self) -> str:
        model = self.engine.base_model
        return f"Chat({model.name_or_path!r}, adapters={list(self.adapters)}, {model.dtype} on {self.engine.device})"

    @property
    def adapters(self) -> tuple[str, ...]:
        """The valid values of ``adapter`` in addition to None."""
        return self.engine.adapters

    def ask(
        self,
        image: ImageInput | Sequence[ImageInput] | None,
        question: str | None = None,
        *,
        adapter: str | EllipsisType | None = ...,
        image_mode: ImageMode | None = None,
        schema: SchemaInput | None = None,
        **sampling: Unpack[SamplingSettings],
    ) -> str:
        """Answer one question.

        Args:
            image: A local path, a Pillow image, the bytes of an image file, or a uint8 array ``[H, W, 3]``; or a list
                of them, which are shown in this order, although LLaVAR was trained with one. None asks without an
                image.
            question: Plain text; nothing in it becomes a special token. None, with a schema, asks for its fields, as
                the records of ``synth --task extract`` and ``ocr converse --task extract`` do.
            adapter: Name of the adapter, None for the base; the default is the first adapter.
            image_mode: Overrides how the model prepares images.
            schema: A JSON Schema or a pydantic model class. The answer is JSON that fulfils it, as long as
                ``max_new_tokens`` suffices; ``parse_answer`` reads it.
            **sampling: Fields of ``Sampling``.

        Raises:
            ImageError: The image is missing or broken.
            ConfigError: The adapter does not exist, the schema is not supported, or a value is out of its range.
            DataError: The question is empty, or longer than the model's context.
        """
        question = _stated_question(question, schema)
        request = self.request(
            image, question, adapter=adapter, image_mode=image_mode, sampling=Sampling(**sampling), schema=schema
        )
        return self.answer([request])[0].text

    def stream(
        self,
        image: ImageInput | Sequence[ImageInput] | None,
        question: str | None = None,
        *,
        adapter: str | EllipsisType | None = ...,
        image_mode: ImageMode | None = None,
        schema: SchemaInput | None = None,
        **sampling: Unpack[SamplingSettings],
    ) -> Iterator[str]:
        """Answer one question piece by piece. The arguments are those of ``ask``.

        Yields:
            Pieces of text in whole characters. Closing the iterator ends the answer.
        """
        question = _stated_question(question, schema)
        request = self.request(
            image, question, adapter=adapter, image_mode=image_mode, sampling=Sampling(**sampling), schema=schema
        )
        pieces: list[str] = []
        yield from stream_row(self.engine, Row(request, self.engine, pieces.append), pieces)

    def conversation(
        self,
        image: ImageInput | Sequence[ImageInput] | None = None,
        *,
        adapter: str | EllipsisType | None = ...,
    ) -> Dialogue:
        """Start a conversation, which remembers earlier turns.

        Args:
            image: The image of the first question; later turns can add others.
            adapter: Name of the adapter, None for the base; the default is the first adapter.
        """
        return Dialogue(self.engine, image, adapter=self.resolve_adapter(adapter))

    def request(
        self,
        image: ImageInput | Sequence[ImageInput] | None,
        question: str,
        *,
        adapter: str | EllipsisType | None = ...,
        image_mode: ImageMode | None = None,
        sampling: Sampling | None = None,
        system: str | None = None,
        schema: SchemaInput | None = None,
        image_first: bool = False,
    ) -> Request:
        """Prepare a question for ``answer``. The arguments are those of ``ask``, and these.

        Args:
            system: The system prompt.
            image_first: Whether the images precede the question in every template, for a model that was trained on
                such records. Otherwise they stand where the template has them; in LLaVAR's, they follow the question.
        """
        if not isinstance(question, str):
            raise ConfigError.at("question", f"got {type(question).__name__}, expected a string", "write the question")
        images = prepare_images(image, self.engine.processor, image_mode)
        content = self.engine.processor.conversation_template.question(question, len(images))
        if image_first and images:
            content = [*(None for _ in images), f"\n{question}"]
        return Request(
            ids=encode_messages(self.engine.processor, [("human", content)], images, system=system),
            images=images,
            sampling=sampling or Sampling(),
            adapter=self.resolve_adapter(adapter),
            grammar=self.engine.compile_schema(schema),
        )

    def answer(self, requests: Sequence[Request], *, batch_size: int = 32) -> list[Answer]:
        """Answer many questions in batches.

        Args:
            requests: Made by ``request``; neighbours with the same adapter form a batch.
            batch_size: Maximum number of questions that are answered at a time.
        """
        if batch_size < 1:
            raise ConfigError.at("batch_size", f"got {batch_size}, expected at least 1", "change it")
        return answer_all(self.engine, requests, batch_size=batch_size)

    def resolve_adapter(self, adapter: str | EllipsisType | None) -> str | None:
        """Return the adapter that a call refers to: the named one, None for the base, the first for ``...``."""
        if isinstance(adapter, EllipsisType):
            return self.adapters[0] if self.adapters else None
        self.engine.check_adapter(adapter)
        return adapter


@dataclass(frozen=True, slots=True, repr=False)
class DialogueReply(ReadableRepr):
    """A question with its images, and the model's answer."""

    question: str
    images: tuple[PromptImage, ...]
    answer: str

    @property
    def image(self) -> PromptImage | None:
        """The first image."""
        return self.images[0] if self.images else None


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

    def __init__(
        self,
        engine: Engine,
        image: ImageInput | Sequence[ImageInput] | None = None,
        *,
        adapter: str | None = None,
    ) -> None:
        self.adapter = adapter
        self.turns: list[DialogueReply] = []
        self._engine = engine
        self._next_images: tuple[PromptImage, ...] = ()
        self._prefix: Prefix | None = None
        self._prefix_adapter: str | None = None
        if image is not None:
            self.show(image)

    def __repr__(self) -> str:
        return f"Dialogue({len(self.turns)} turns, adapter={self.adapter!r})"

    def show(self, image: ImageInput | Sequence[ImageInput], image_mode: ImageMode | None = None) -> None:
        """Choose the image, or the images, of the next question.

        Args:
            image: As in ``Chat.ask``.
            image_mode: Overrides how the model prepares images.

        Raises:
            ImageError: The image is missing or broken.
        """
        earlier = [shown for turn in self.turns for shown in turn.images]
        self._next_images = tuple(prepare_images(image, self._engine.processor, image_mode, earlier=earlier))

    def clear(self) -> None:
        """Remove all turns and images."""
        self.turns.clear()
        self._next_images, self._prefix = (), None

    def send(
        self,
        text: str,
        image: ImageInput | Sequence[ImageInput] | None = None,
        *,
        schema: SchemaInput | None = None,
        **sampling: Unpack[SamplingSettings],
    ) -> str:
        """Send a message and return the answer.

        Args:
            text: Plain text; nothing in it becomes a special token.
            image: An image or several, as in ``Chat.ask``.
            schema: What the answer has to follow, as in ``Chat.ask``.
            **sampling: Fields of ``Sampling``.

        Raises:
            ImageError: The image is missing or broken.
            DataError: The message is empty, or the conversation is longer than the model's context.
        """
        return "".join(self.stream(text, image, schema=schema, **sampling))

    def stream(
        self,
        text: str,
        image: ImageInput | Sequence[ImageInput] | None = None,
        *,
        schema: SchemaInput | None = None,
        **sampling: Unpack[SamplingSettings],
    ) -> Generator[str, None, None]:
        """Send a message and yield the answer piece by piece. The arguments are those of ``send``.

        If the iterator is closed or an exception interrupts it, the turn keeps the answer so far.
        """
        if image is not None:
            self.show(image)
        images = self._next_images
        pieces: list[str] = []
        row = Row(self._request(text, images, Sampling(**sampling), schema), self._engine, pieces.append)
        try:
            yield from stream_row(self._engine, row, pieces)
        finally:
            if row.text or (row.answer is not None and row.answer.finish_reason != "cancelled"):
                self.turns.append(DialogueReply(text, images, row.text))
                self._next_images = ()
            # Without an answer the step was interrupted; the keys and values of the earlier turns are still valid.
            if row.answer is not None:
                self._prefix, self._prefix_adapter = row.answer.prefix, row.request.adapter

    def _request(
        self, text: str, shown: tuple[PromptImage, ...], sampling: Sampling, schema: SchemaInput | None
    ) -> Request:
        check_question(text)
        ask = self._engine.processor.conversation_template.question
        messages: list[tuple[Role, Content]] = []
        for turn in self.turns:
            messages += [("human", ask(turn.question, len(turn.images))), ("gpt", [turn.answer])]
        messages.append(("human", ask(text, len(shown))))
        images = [image for turn in self.turns for image in turn.images] + list(shown)
        ids = encode_messages(self._engine.processor, messages, images)
        prefix = self._prefix if self._prefix_adapter == self.adapter else None
        if prefix is not None:
            prefix = prefix.shared_with(ids, images, self._engine.processor.image_token_id)
        return Request(
            ids=ids, images=images, sampling=sampling, adapter=self.adapter, prefix=prefix, keep_prefix=True,
            grammar=self._engine.compile_schema(schema),
        )  # fmt: skip
