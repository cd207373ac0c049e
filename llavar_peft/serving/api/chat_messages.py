"""Conversion of a client's messages into a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

from llavar_peft.errors import ConfigError, LlavarError, MissingDependencyError
from llavar_peft.inference.generation_request import Request, encode_messages
from llavar_peft.inference.json_grammar import GrammarCompiler, JsonGrammar
from llavar_peft.inference.token_sampling import Sampling
from llavar_peft.models.processing_llavar import LlavarProcessor
from llavar_peft.serving.api.api_schema import ChatRequest, ImagePart, Message, Part, TextPart, schema_error
from llavar_peft.serving.api.request_images import RequestImageReader
from llavar_peft.serving.api.request_limits import RequestLimits, RequestRejectedError
from llavar_peft.types import Role

Turn = tuple[Role, list[Part]]
_ROLES: Final[dict[str, Role]] = {"user": "human", "assistant": "gpt"}


def read_conversation(
    request: ChatRequest,
    processor: LlavarProcessor,
    images: RequestImageReader,
    limits: RequestLimits,
    *,
    adapter: str | None,
    most_characters: int | None = None,
    grammars: Callable[[], GrammarCompiler] | None = None,
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
        most_characters: Length of all texts from which they cannot fit into the model's context. Encoding a text takes
            long, and longer ones are rejected before.
        grammars: Returns what compiles the schemas of answers; without it, requests for JSON are rejected.

    Returns:
        ``n`` requests with different seeds.

    Raises:
        RequestRejectedError: The messages are not a valid conversation, or a limit is exceeded.
    """
    grammar = _compile_schema(request, limits, grammars)
    system, turns = _split(request.messages)
    texts = (part.text for _, parts in turns for part in parts if isinstance(part, TextPart))
    if most_characters is not None and len(system or "") + sum(map(len, texts)) > most_characters:
        raise context_error()
    addresses = [part.url for _, parts in turns for part in parts if isinstance(part, ImagePart)]
    if len(addresses) > limits.images:
        raise RequestRejectedError(
            400, f"A request may have at most {limits.images} images.", "too_many_images", param="messages"
        )
    opened = images.open(addresses)
    shown, counts = [image for group in opened for image in group], iter(map(len, opened))
    write = processor.conversation_template.question
    messages = [(role, write(_text(parts), sum(islice(counts, _count_images(parts))))) for role, parts in turns]
    try:
        ids = encode_messages(processor, messages, shown, system=system)
    except LlavarError:
        raise RequestRejectedError(
            400, "The messages cannot be encoded.", "invalid_request", param="messages"
        ) from None
    return [
        Request(ids=ids, images=shown, sampling=one, adapter=adapter, grammar=grammar)
        for one in _samplings(request, limits)
    ]


def _compile_schema(
    request: ChatRequest, limits: RequestLimits, grammars: Callable[[], GrammarCompiler] | None
) -> JsonGrammar | None:
    """Return what the answer has to follow, None for any text."""
    unavailable = RequestRejectedError(
        400, "response_format: this server answers with text only.", "unsupported", param="response_format"
    )
    try:
        schema = request.schema_of_answer(limits.schema)
        if schema is None:
            return None
        if grammars is None:
            raise unavailable
        return grammars().compile(schema)
    except ConfigError as error:
        raise schema_error(error) from None
    except MissingDependencyError as error:
        raise unavailable from error


def context_error() -> RequestRejectedError:
    """Return the error for a prompt that does not fit into the model's context."""
    what = "The messages are longer than the model's context."
    return RequestRejectedError(400, what, "context_length_exceeded", param="messages")


def _split(messages: Sequence[Message]) -> tuple[str | None, list[Turn]]:
    """Return the system prompt, and the turns of human and model in alternation, the human's first.

    The system prompt is None for the template's own.

    As OpenAI's API does, messages of one role in a row are taken as one. An assistant's greeting before the first
    question is left out, because the model was trained on conversations that a human begins.
    """
    first = next((number for number, one in enumerate(messages) if one.role in _ROLES), len(messages))
    system, rest = messages[:first], messages[first:]
    turns: list[Turn] = []
    for message in rest:
        if message.role not in _ROLES:
            raise _invalid("A system message has to come before the other messages.")
        role, parts = _ROLES[message.role], message.parts()
        if role == "gpt" and not turns:
            continue
        if role == "gpt" and any(isinstance(part, ImagePart) for part in parts):
            raise _invalid("Images are supported in user messages only.")
        if turns and turns[-1][0] == role:
            turns[-1][1].extend(parts)
        else:
            turns.append((role, parts))
    if not turns or turns[-1][0] != "human":
        raise _invalid("messages: the last message has to be the user's.")
    prompt = [message.parts() for message in system]
    if any(isinstance(part, ImagePart) for parts in prompt for part in parts):
        raise _invalid("Images are supported in user messages only.")
    return "\n".join(text for parts in prompt if (text := _text(parts))) or None, turns


def _text(parts: Sequence[Part]) -> str:
    return "\n".join(part.text for part in parts if isinstance(part, TextPart))


def _count_images(parts: Sequence[Part]) -> int:
    return sum(isinstance(part, ImagePart) for part in parts)


def _invalid(what: str) -> RequestRejectedError:
    return RequestRejectedError(400, what, "invalid_request", param="messages")


def _samplings(request: ChatRequest, limits: RequestLimits) -> list[Sampling]:
    field = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = request.max_completion_tokens or request.max_tokens
    if max_tokens is not None and max_tokens > limits.new_tokens:
        what = f"{field}: the limit is {limits.new_tokens}."
        raise RequestRejectedError(400, what, "too_many_tokens", param=field)
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
