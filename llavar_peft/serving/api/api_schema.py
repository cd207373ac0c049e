"""The JSON of a chat completion request, and parts of the JSON of its response.

Source: OpenAI's API reference, ``POST /v1/chat/completions``. Fields that would change the answer and are not supported
are rejected; unknown fields are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from llavar_peft.inference.generation_request import Answer
from llavar_peft.inference.text_stream import bytes_of_tokens
from llavar_peft.serving.api.request_limits import RequestRejectedError

_Text = Annotated[str, Field(max_length=400_000)]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class TextPart(_Part):
    """Text."""

    type: Literal["text"]
    text: _Text


class ImageAddress(_Part):
    """A ``data:`` URL, or an http(s) URL of a host that the server allows."""

    url: str


class ImagePart(_Part):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageAddress


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Part):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | Annotated[list[Part], Field(max_length=64)]


class StreamOptions(_Part):
    """What a stream contains besides the text."""

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
    # Not supported: a value that would change the answer is rejected.
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    logit_bias: dict[str, Any] | None = None
    presence_penalty: _Number | None = None
    frequency_penalty: _Number | None = None

    def stops(self) -> tuple[str, ...]:
        """Return the texts that end an answer."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


_REQUEST = TypeAdapter(ChatRequest)
_PLAIN_FORMAT = {"type": "text"}


def parse_request(body: bytes) -> ChatRequest:
    """Parse a request's JSON.

    Raises:
        RequestRejectedError: The body is invalid, or requests something that is not supported.
    """
    try:
        request = _REQUEST.validate_json(body)
    except ValidationError as error:
        # The location consists of this schema's field names and of indices, never of the client's text.
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        what = "The body is not valid JSON." if first["type"] == "json_invalid" else first["msg"][:200]
        raise RequestRejectedError(
            400, f"{field}: {what}" if field else what, "invalid_request", param=field or None
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
            raise RequestRejectedError(400, f"{name} is not supported.", "unsupported", param=name)
    if len(request.stops()) > 4:
        raise RequestRejectedError(400, "stop: at most 4 texts are supported.", "invalid_request", param="stop")
    return request


def count_usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Return the number of tokens of a request's answers; the prompt counts once."""
    prompt = answers[0].prompt_tokens
    completion = sum(answer.completion_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def format_logprobs(answer: Answer, tokenizer: Any) -> dict[str, Any] | None:
    """Return the tokens of an answer's text with their log-probabilities, or None if none were requested.

    Tokens that add nothing to the text (a closing ``</s>``, white space at the ends, a stop text) count in the usage
    only.
    """
    if answer.logprobs is None:
        return None
    parts = bytes_of_tokens(tokenizer, answer.ids, answer.text)
    return {
        "content": [
            {"token": _token_text(part), "logprob": logprob, "bytes": list(part), "top_logprobs": []}
            for part, logprob in zip(parts, answer.logprobs, strict=True)
            if part
        ]
    }


def _token_text(part: bytes) -> str:
    r"""Return a token as text, or an incomplete character as OpenAI writes it, e.g. ``\xe2\x82``."""
    try:
        return part.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in part)
