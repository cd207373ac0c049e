"""A client's messages as a prompt."""

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
from llavar_peft.serving.api.request_limits import RequestLimits, RequestRefusedError
from llavar_peft.types import Role


def read_conversation(
    request: ChatRequest,
    processor: LlavarProcessor,
    images: RequestImageReader,
    limits: RequestLimits,
    *,
    adapter: str | None,
) -> list[Request]:
    """Prepare the answers that a request wants. For a thread of its own.

    The words of a message come first, then its images, as in the original. A system message takes the place of the
    template's own. Nothing in any text is a special token.

    Args:
        request: As the client sent it.
        processor: The model's.
        images: Opens them.
        limits: What is accepted.
        adapter: Who answers.

    Returns:
        ``n`` requests, whose seeds differ.

    Raises:
        RequestRefusedError: The messages are not a conversation, or something is too large.
    """
    system, turns = _split(request.messages)
    addresses = [part.image_url.url for turn in turns for part in _parts(turn) if isinstance(part, ImagePart)]
    if len(addresses) > limits.images:
        raise RequestRefusedError(400, f"at most {limits.images} pictures", "too_many_images", param="messages")
    shown = [images.open(address) for address in addresses]
    messages = [(_role(turn), _content(turn)) for turn in turns]
    try:
        ids = encode_messages(processor, messages, shown, system=system)
    except LlavarError:
        raise RequestRefusedError(400, "the messages cannot be encoded", "invalid_request", param="messages") from None
    return [Request(ids=ids, images=shown, sampling=one, adapter=adapter) for one in _samplings(request, limits)]


def _split(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    system = [message for message in messages if message.role in ("system", "developer")]
    turns = [message for message in messages if message.role in ("user", "assistant")]
    expected = ["user" if place % 2 == 0 else "assistant" for place in range(len(turns))]
    if list(messages[: len(system)]) != system or len(turns) % 2 == 0 or [turn.role for turn in turns] != expected:
        what = "messages: an optional system message, then user and assistant in turn, the user last"
        raise RequestRefusedError(400, what, "invalid_request", param="messages")
    for message in (*system, *turns[1::2]):
        if any(isinstance(part, ImagePart) for part in _parts(message)):
            raise RequestRefusedError(
                400, "pictures come with the user's messages", "invalid_request", param="messages"
            )
    return "\n".join(_words(message) for message in system) or SYSTEM_PROMPT, turns


def _parts(message: Message) -> Sequence[TextPart | ImagePart]:
    return [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content


def _words(message: Message) -> str:
    return "\n".join(part.text for part in _parts(message) if isinstance(part, TextPart))


def _role(message: Message) -> Role:
    return "human" if message.role == "user" else "gpt"


def _content(message: Message) -> Content:
    images = sum(isinstance(part, ImagePart) for part in _parts(message))
    words = _words(message)
    return [f"{words}\n", *[None] * images] if images else [words]


def _samplings(request: ChatRequest, limits: RequestLimits) -> list[Sampling]:
    expected = request.max_completion_tokens or request.max_tokens
    if expected is not None and expected > limits.new_tokens:
        raise RequestRefusedError(
            400, f"max_tokens: at most {limits.new_tokens}", "too_many_tokens", param="max_tokens"
        )
    choices = request.n or 1
    if choices > limits.choices:
        raise RequestRefusedError(400, f"n: at most {limits.choices}", "too_many_choices", param="n")
    standard = Sampling()
    return [
        Sampling(
            max_new_tokens=expected or min(standard.max_new_tokens, limits.new_tokens),
            temperature=standard.temperature if request.temperature is None else request.temperature,
            top_p=standard.top_p if request.top_p is None else request.top_p,
            seed=None if request.seed is None else (request.seed + number) % 2**63,
            stop=request.stops(),
            logprobs=bool(request.logprobs),
        )
        for number in range(choices)
    ]
