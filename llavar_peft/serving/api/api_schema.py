"""The JSON of a chat completion request, and parts of the JSON of its response.

Source: OpenAI's API reference, ``POST /v1/chat/completions``. Fields that would change the answer and are not supported
are rejected; unknown fields are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from llavar_peft.data.json_schema import AnswerSchema, SchemaLimits
from llavar_peft.errors import ConfigError, LlavarError
from llavar_peft.inference.generation_request import Answer
from llavar_peft.inference.text_stream import bytes_of_tokens
from llavar_peft.serving.api.request_limits import RequestRejectedError

_MAX_TEXT, _MAX_PARTS, _MAX_STOPS = 400_000, 64, 4
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True)


@dataclass(frozen=True, slots=True)
class TextPart:
    """Text."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image: a ``data:`` URL, or an http(s) URL of a host that the server allows."""

    url: str


Part = TextPart | ImagePart


class Message(_Fields):
    """A message of the conversation.

    Attributes:
        role: The speaker.
        content: As the client sent it: a string, a list of parts, or null.
        name: Ignored.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Any = None
    name: str | None = None

    def parts(self) -> list[Part]:
        """Return the content of a message that ``parse_request`` has checked."""
        return _read_content(self.content, "content")


class StreamOptions(_Fields):
    """What a stream contains besides the text."""

    include_usage: bool | None = None


class ChatRequest(_Fields):
    """A request for a chat completion."""

    model: Annotated[str, Field(max_length=400)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[_Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[_Number, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=_MAX_STOPS)] | None = None
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

    def schema_of_answer(self, limits: SchemaLimits) -> AnswerSchema | None:
        """Return what the answer has to follow, None for any text.

        Raises:
            RequestRejectedError: The schema is none, or exceeds the limits.
        """
        form = self.response_format or {}
        kind = form.get("type", _PLAIN_FORMAT)
        if kind == _PLAIN_FORMAT:
            return None
        if kind == "json_object":
            return AnswerSchema.of({"type": "object"})
        described = form.get("json_schema")
        if not isinstance(described, dict):
            raise _invalid("response_format.json_schema", "expected an object with name and schema")
        schema = described.get("schema")
        if not isinstance(schema, dict):
            raise _invalid(f"{SCHEMA_FIELD}", "expected a JSON Schema, an object")
        try:
            return AnswerSchema.of(schema, SCHEMA_FIELD, limits)
        except ConfigError as error:
            raise schema_error(error) from None


_REQUEST = TypeAdapter(ChatRequest)
_PLAIN_FORMAT = "text"
_FORMATS = (_PLAIN_FORMAT, "json_object", "json_schema")
SCHEMA_FIELD = "response_format.json_schema.schema"
_LONGEST_FAULT, _LONGEST_PARAM = 600, 200
_UNIONS = frozenset({"stop"})
_OTHER_TYPE = frozenset({"string_type", "list_type"})


def parse_request(body: bytes) -> ChatRequest:
    """Parse a request's JSON.

    Raises:
        RequestRejectedError: The body is invalid, or requests something that is not supported.
    """
    try:
        request = _REQUEST.validate_json(body)
    except ValidationError as error:
        # The location consists of this schema's field names and of indices, never of the client's text.
        found = error.errors(include_url=False, include_context=False, include_input=False)
        same = [one for one in found if one["loc"][:1] == found[0]["loc"][:1]]
        # Of a union's branches, that of the type which the client sent.
        first = next((one for one in same if one["type"] not in _OTHER_TYPE), found[0])
        field = ".".join(_named_places(first["loc"]))
        what = f"The body is not valid JSON ({first['msg'].partition(': ')[2]})."
        what = what if first["type"] == "json_invalid" else first["msg"][:200]
        raise RequestRejectedError(
            400, f"{field}: {what}" if field else what, "invalid_request", param=field or None
        ) from None
    form = (request.response_format or {}).get("type", _PLAIN_FORMAT)
    if form not in _FORMATS:
        what = f"response_format.type: expected one of {', '.join(_FORMATS)}."
        raise RequestRejectedError(400, what, "unsupported", param="response_format.type")
    unsupported = {
        "tools": bool(request.tools),
        "functions": bool(request.functions),
        "logit_bias": bool(request.logit_bias),
        "presence_penalty": bool(request.presence_penalty),
        "frequency_penalty": bool(request.frequency_penalty),
        "top_logprobs": bool(request.top_logprobs),
    }
    for name, given in unsupported.items():
        if given:
            raise RequestRejectedError(400, f"{name} is not supported.", "unsupported", param=name)
    for number, message in enumerate(request.messages):
        where = f"messages.{number}.content"
        if message.content is None and message.role != "assistant":
            raise _invalid(where, "expected a string or a list of parts")
        _read_content(message.content, where)
    return request


def _named_places(location: Sequence[int | str]) -> Iterator[str]:
    """Yield the parts of a location that are the client's: fields and indices, without the branches of a union."""
    for place, part in enumerate(location):
        if place and isinstance(part, str) and location[0] in _UNIONS:
            return
        yield str(part)


def _read_content(content: Any, where: str) -> list[Part]:
    """Return the parts of a message's content. An error names the part at fault, in this schema's words."""
    if content is None:
        return [TextPart("")]
    if isinstance(content, str):
        return [TextPart(_read_text(content, where))]
    if not isinstance(content, list):
        raise _invalid(where, "expected a string or a list of parts")
    if len(content) > _MAX_PARTS:
        raise _invalid(where, f"expected at most {_MAX_PARTS} parts")
    return [_read_part(part, f"{where}.{number}") for number, part in enumerate(content)]


def _read_part(part: Any, where: str) -> Part:
    if isinstance(part, str):
        return TextPart(_read_text(part, where))
    if not isinstance(part, dict):
        raise _invalid(where, "expected a part: an object with type, and text or image_url")
    kind = part.get("type")
    if kind == "text":
        return TextPart(_read_text(part.get("text"), f"{where}.text"))
    if kind == "file" and (document := _document_url(part.get("file"))):
        return ImagePart(document)
    if kind != "image_url":
        # Only names as APIs have them are repeated to the client.
        named = isinstance(kind, str) and re.fullmatch(r"[a-z_]{1,32}", kind) is not None
        got = f"{kind!r} is not known" if named else "missing" if kind is None else "not known"
        raise _invalid(f"{where}.type", f"{got}, expected 'text' or 'image_url'")
    address = part.get("image_url")
    url = address.get("url") if isinstance(address, dict) else address
    if not isinstance(url, str):
        raise _invalid(f"{where}.image_url", "expected an object with url, or the URL as a string")
    return ImagePart(url)


def _document_url(file: Any) -> str | None:
    """Return the data URL of a PDF document that is sent as OpenAI's clients send files."""
    url = file.get("file_data") if isinstance(file, dict) else None
    return url if isinstance(url, str) and url[:40].lstrip().lower().startswith("data:application/pdf;") else None


def _read_text(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise _invalid(where, "expected a string")
    if len(text) > _MAX_TEXT:
        raise _invalid(where, f"expected at most {_MAX_TEXT} characters")
    return text


def schema_error(error: LlavarError) -> RequestRejectedError:
    """Return the error for a schema that answers cannot follow, in the words of the check and with its place."""
    fault = error.faults[0]
    # Names and values of the client's schema are repeated: no line breaks for the log, no halves of characters.
    what, where = ("".join(one if one.isprintable() else "?" for one in text) for text in (str(fault), fault.where))
    return RequestRejectedError(400, what[:_LONGEST_FAULT], "invalid_schema", param=where[:_LONGEST_PARAM])


def _invalid(where: str, what: str) -> RequestRejectedError:
    return RequestRejectedError(400, f"{where}: {what}.", "invalid_request", param=where)


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
