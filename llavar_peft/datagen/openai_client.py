"""Client for OpenAI-compatible endpoints, and a chat model whose replies are kept in a journal."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from llavar_peft.data.resume_journal import ResumeJournal
from llavar_peft.errors import EnvironmentFaultError, InterruptedRunError, LlavarError, MissingDependencyError

if TYPE_CHECKING:
    from openai import APIError

Message: TypeAlias = Mapping[str, Any]
"""``role``, and ``content``: a text, or parts in OpenAI's form."""

_DENIED: Final = (401, 403, 404)
_REJECTED: Final = (400, 413, 422)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model at an OpenAI-compatible endpoint, and how to send requests to it.

    Attributes:
        base_url: Address of the endpoint; None for ``OPENAI_BASE_URL``, or OpenAI's own.
        key_variable: Environment variable that holds the API key.
        max_tokens: Maximum length of a reply; None for the endpoint's default.
        tries: Number of retries of a request that is rate-limited or fails on the server's side. The client waits as
            long as ``Retry-After`` says, otherwise with exponential backoff.
        timeout: Maximum wait for a reply, in seconds.
    """

    model: str
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    temperature: float = 0.7
    max_tokens: int | None = None
    tries: int = 8
    timeout: float = 120.0


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A reply of a model; a response without a message has an empty one.

    Attributes:
        content: The text; empty if the model wrote none.
        refusal: The model's explanation of a refusal, if it gave one separately.
        refused: Whether the model, or a content filter, refused to answer.
    """

    content: str = ""
    refusal: str = ""
    refused: bool = False


class EndpointError(Exception):
    """A request failed for good.

    Attributes:
        kind: ``"rejected"``: the endpoint does not accept this request; ``"denied"``: the key, the address or the
            model's name is wrong; ``"unavailable"``: the endpoint cannot be reached or keeps failing.
        filtered: Whether a content filter rejected the request.
    """

    def __init__(self, error: APIError) -> None:
        from openai import APIStatusError

        super().__init__(str(error))
        status = error.status_code if isinstance(error, APIStatusError) else None
        self.kind: Literal["rejected", "denied", "unavailable"] = (
            "rejected" if status in _REJECTED else "denied" if status in _DENIED else "unavailable"
        )
        self.filtered = error.code == "content_filter"  # Azure's form of a refusal


class ChatClient:
    """Sends chat requests to an endpoint; safe for use by several threads.

    Raises:
        MissingDependencyError: ``openai`` is not installed.
        EnvironmentFaultError: The API key is not set.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        try:
            from openai import OpenAI
        except ImportError as error:
            raise MissingDependencyError.at(
                "openai", f"is not installed ({error})", "pip install 'llavar-peft[eval]'"
            ) from error
        key = os.environ.get(endpoint.key_variable)
        if not key:
            raise EnvironmentFaultError.at(
                endpoint.key_variable, "is not set", "export the endpoint's key (any text if it needs none)"
            )
        self.endpoint = endpoint
        self._client = OpenAI(
            api_key=key, base_url=endpoint.base_url, max_retries=endpoint.tries, timeout=endpoint.timeout
        )

    @property
    def address(self) -> str:
        """Return the endpoint's address."""
        return str(self._client.base_url)

    def request_body(self, messages: Sequence[Message]) -> dict[str, Any]:
        """Return the body of a request, without characters that cannot be sent (unpaired surrogates)."""
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": [_sendable(dict(message)) for message in messages],
            "temperature": self.endpoint.temperature,
        }
        return body if self.endpoint.max_tokens is None else {**body, "max_tokens": self.endpoint.max_tokens}

    def send(self, body: Mapping[str, Any]) -> ChatReply:
        """Send a request from ``request_body`` and return the reply. Raises ``EndpointError``."""
        from openai import APIError

        try:
            response = self._client.chat.completions.with_raw_response.create(**body)
        except APIError as error:
            raise EndpointError(error) from error
        return _parse_reply(response.http_response.content)


def _sendable(value: Any) -> Any:
    """Return a value whose texts have no unpaired surrogates."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {name: _sendable(one) for name, one in value.items()}
    return [_sendable(one) for one in value] if isinstance(value, list) else value


def _parse_reply(content: bytes) -> ChatReply:
    """Parse a response; one that has no message, such as a proxy's login page, gives an empty reply."""
    try:
        choice = json.loads(content)["choices"][0]
        text, refusal = choice["message"].get("content") or "", choice["message"].get("refusal") or ""
        refused = bool(refusal) or choice.get("finish_reason") == "content_filter"
    except (ValueError, LookupError, TypeError, AttributeError):
        return ChatReply()
    return ChatReply(text if isinstance(text, str) else "", refusal if isinstance(refusal, str) else "", refused)


class EndpointRejectedError(LlavarError, ValueError):
    """The endpoint does not accept this request, however often it is sent."""


class ChatModel:
    """A chat model that keeps its replies in a journal, so that no request is paid for twice; thread-safe.

    Args:
        endpoint: The model.
        journal: Entries with ``key`` (a hash of the request), ``model`` and ``reply``.

    Attributes:
        asked: Number of requests sent.
        remembered: Number of replies taken from the journal.
    """

    def __init__(self, endpoint: Endpoint, journal: ResumeJournal) -> None:
        self._journal = journal
        self._replies = {entry["key"]: str(entry["reply"]) for _, entry in journal.entries()}
        self._client = ChatClient(endpoint)
        self._lock = threading.Lock()
        self.asked = 0
        self.remembered = 0

    def ask(self, messages: Sequence[Message]) -> str:
        """Return the model's reply, empty if it wrote nothing.

        Raises:
            EndpointRejectedError: The endpoint does not accept this request.
            InterruptedRunError: The endpoint keeps failing.
            EnvironmentFaultError: The key, the address or the model's name is wrong.
        """
        endpoint = self._client.endpoint
        hashed = [endpoint.model, endpoint.temperature, [dict(message) for message in messages]]
        key = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
        with self._lock:
            if key in self._replies:
                self.remembered += 1
                return self._replies[key]
        try:
            reply = self._client.send(self._client.request_body(messages)).content
        except EndpointError as error:
            raise self._describe(error) from error
        with self._lock:
            self.asked += 1
            if reply:
                self._replies[key] = reply
                self._journal.append({"key": key, "model": endpoint.model, "reply": reply})
        return reply

    def _describe(self, error: EndpointError) -> LlavarError:
        endpoint = self._client.endpoint
        where, message = f"{self._client.address} {endpoint.model}", str(error)[:300]
        if error.kind == "rejected":
            return EndpointRejectedError.at(where, f"rejected the request ({message})", "leave the image out")
        if error.kind == "denied":
            return EnvironmentFaultError.at(where, message, f"check --model, --base-url and {endpoint.key_variable}")
        return InterruptedRunError.at(
            where,
            f"failed {endpoint.tries + 1} times in a row ({message})",
            "run the same command again later; replies received so far are kept",
        )
