"""A request for a chat completion as it comes over the wire, and the answer as it goes back.

Source: OpenAI's API reference, ``POST /v1/chat/completions``. Fields that would change the answer and are not supported
are refused; others that are not known are passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from llavar_peft.inference.generation_request import Answer
from llavar_peft.inference.text_stream import bytes_of_tokens
from llavar_peft.serving.api.request_limits import RequestRefusedError

_Text = Annotated[str, Field(max_length=400_000)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class TextPart(_Part):
    """Words."""

    type: Literal["text"]
    text: _Text


class ImageAddress(_Part):
    """Where an image is: in a ``data:`` URL, or, if the server allows its host, elsewhere."""

    url: str


class ImagePart(_Part):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageAddress


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Part):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | Annotated[list[Part], Field(max_length=64)]


class StreamOptions(_Part):
    """What a stream holds besides the text."""

    include_usage: bool = False


class ChatRequest(_Part):
    """A request for a chat completion."""

    model: Annotated[str, Field(max_length=400)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[_Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[_Number, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: _Stop | list[_Stop] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    # Not supported: a value that would matter is refused.
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    logit_bias: dict[str, Any] | None = None
    presence_penalty: _Number | None = None
    frequency_penalty: _Number | None = None

    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


_REQUEST = TypeAdapter(ChatRequest)
_PLAIN_FORMAT = {"type": "text"}


def parse_request(body: bytes) -> ChatRequest:
    """Read a request's body.

    Args:
        body: JSON.

    Returns:
        The request.

    Raises:
        RequestRefusedError: It is not one, or asks for what is not supported.
    """
    try:
        request = _REQUEST.validate_json(body)
    except ValidationError as error:
        # Places are named by this schema's fields and by numbers, never by what the client wrote.
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        what = "the body is not valid JSON" if first["type"] == "json_invalid" else first["msg"][:200]
        raise RequestRefusedError(
            400, f"{place}: {what}" if place else what, "invalid_request", param=place or None
        ) from None
    unsupported = {
        "tools": bool(request.tools),
        "functions": bool(request.functions),
        "response_format": request.response_format not in (None, _PLAIN_FORMAT),
        "logit_bias": bool(request.logit_bias),
        "presence_penalty": bool(request.presence_penalty),
        "frequency_penalty": bool(request.frequency_penalty),
        "top_logprobs": bool(request.top_logprobs),
    }
    for name, given in unsupported.items():
        if given:
            raise RequestRefusedError(400, f"{name} is not supported", "unsupported", param=name)
    if len(request.stops()) > 4:
        raise RequestRefusedError(400, "stop: at most 4 texts", "invalid_request", param="stop")
    return request


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens of a request's answers; the prompt counts once."""
    prompt = answers[0].prompt_tokens
    completion = sum(answer.completion_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def logprobs_of(answer: Answer, tokenizer: Any) -> dict[str, Any] | None:
    """The tokens that an answer's text is made of, with their log-probabilities, if they were asked for.

    Others that were chosen (a closing ``</s>``, white space at the ends, a stop text) are counted in the usage alone.
    """
    if answer.logprobs is None:
        return None
    parts = bytes_of_tokens(tokenizer, answer.ids, answer.text)
    return {
        "content": [
            {"token": _spelled(part), "logprob": logprob, "bytes": list(part), "top_logprobs": []}
            for part, logprob in zip(parts, answer.logprobs, strict=True)
            if part
        ]
    }


def _spelled(part: bytes) -> str:
    r"""A token as text; the part of a character as OpenAI spells it, ``\xe2\x82``."""
    try:
        return part.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in part)
