"""Conversion of a client's messages into a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from llavar_peft.constants import SYSTEM_PROMPT
from llavar_peft.data.conversation_template import Content
from llavar_peft.errors import LlavarError
from llavar_peft.inference.generation_request import Request, encode_messages
from llavar_peft.inference.token_sampling import Sampling
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.serving.api.api_schema import ChatRequest, ImagePart, Message, TextPart
from llavar_peft.serving.api.request_images import RequestImageReader
from llavar_peft.serving.api.request_limits import RequestLimits, RequestRejectedError
from llavar_peft.types import Role


def read_conversation(
    request: ChatRequest,
    processor: LlavarProcessor,
    images: RequestImageReader,
    limits: RequestLimits,
    *,
    adapter: str | None,
) -> list[Request]:
    """Convert a chat request into one generation request per answer. Run it in a thread: it decodes images.

    The text of a message comes first and then its images, as in the original. A system message replaces the template's
    default. No part of any text becomes a special token.

    Args:
        request: The parsed request.
        processor: The model's processor.
        images: Opens the images.
        limits: Limits of a request.
        adapter: The adapter to use; None is the model without one.

    Returns:
        ``n`` requests with different seeds.

    Raises:
        RequestRejectedError: The messages are not a valid conversation, or a limit is exceeded.
    """
    system, turns = _split(request.messages)
    addresses = [part.image_url.url for turn in turns for part in _parts(turn) if isinstance(part, ImagePart)]
    if len(addresses) > limits.images:
        raise RequestRejectedError(
            400, f"A request may have at most {limits.images} images.", "too_many_images", param="messages"
        )
    shown = [images.open(address) for address in addresses]
    messages = [(_role(turn), _content(turn)) for turn in turns]
    try:
        ids = encode_messages(processor, messages, shown, system=system)
    except LlavarError:
        raise RequestRejectedError(
            400, "The messages cannot be encoded.", "invalid_request", param="messages"
        ) from None
    return [Request(ids=ids, images=shown, sampling=one, adapter=adapter) for one in _samplings(request, limits)]


def _split(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    system = [message for message in messages if message.role in ("system", "developer")]
    turns = [message for message in messages if message.role in ("user", "assistant")]
    expected = ["user" if place % 2 == 0 else "assistant" for place in range(len(turns))]
    if list(messages[: len(system)]) != system or len(turns) % 2 == 0 or [turn.role for turn in turns] != expected:
        what = "messages: expected an optional system message, then user and assistant in turn, ending with user."
        raise RequestRejectedError(400, what, "invalid_request", param="messages")
    for message in (*system, *turns[1::2]):
        if any(isinstance(part, ImagePart) for part in _parts(message)):
            raise RequestRejectedError(
                400, "Images are supported in user messages only.", "invalid_request", param="messages"
            )
    return "\n".join(_text(message) for message in system) or SYSTEM_PROMPT, turns


def _parts(message: Message) -> Sequence[TextPart | ImagePart]:
    return [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content


def _text(message: Message) -> str:
    return "\n".join(part.text for part in _parts(message) if isinstance(part, TextPart))


def _role(message: Message) -> Role:
    return "human" if message.role == "user" else "gpt"


def _content(message: Message) -> Content:
    images = sum(isinstance(part, ImagePart) for part in _parts(message))
    text = _text(message)
    return [f"{text}\n", *[None] * images] if images else [text]


def _samplings(request: ChatRequest, limits: RequestLimits) -> list[Sampling]:
    max_tokens = request.max_completion_tokens or request.max_tokens
    if max_tokens is not None and max_tokens > limits.new_tokens:
        what = f"max_tokens: the limit is {limits.new_tokens}."
        raise RequestRejectedError(400, what, "too_many_tokens", param="max_tokens")
    choices = request.n or 1
    if choices > limits.choices:
        raise RequestRejectedError(400, f"n: the limit is {limits.choices}.", "too_many_choices", param="n")
    default = Sampling()
    return [
        Sampling(
            max_new_tokens=max_tokens or min(default.max_new_tokens, limits.new_tokens),
            temperature=default.temperature if request.temperature is None else request.temperature,
            top_p=default.top_p if request.top_p is None else request.top_p,
            seed=None if request.seed is None else (request.seed + number) % 2**63,
            stop=request.stops(),
            logprobs=bool(request.logprobs),
        )
        for number in range(choices)
    ]
