"""Any OpenAI-compatible model, with each reply kept so that nothing is paid for twice."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from llavar_peft.datagen.ocr.resume_journal import ResumeJournal
from llavar_peft.errors import EnvironmentFaultError, InterruptedRunError, LlavarError, MissingDependencyError

if TYPE_CHECKING:
    from openai import APIError, OpenAI

Message: TypeAlias = Mapping[str, str]

_OURS_TO_MEND: Final = (401, 403, 404)
_THIS_REQUEST: Final = (400, 413, 422)


class EndpointRefusedError(LlavarError, ValueError):
    """The endpoint will not answer this one request, however often it is asked."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a model is, and how it is asked.

    Attributes:
        model: Its name there.
        base_url: Address of an OpenAI-compatible service; None is ``OPENAI_BASE_URL``, or OpenAI's own.
        key_variable: The environment's variable that holds the key.
        temperature: Of sampling.
        tries: Requests that fail for a passing reason are sent again this often, with growing pauses, or after those
            that the service asks for.
        timeout: Seconds to wait for an answer.
    """

    model: str
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    temperature: float = 0.7
    tries: int = 8
    timeout: float = 120.0


class ChatModel:
    """A model behind an endpoint, and the replies it gave. May be asked by several threads.

    Args:
        endpoint: Where it is.
        journal: Of replies by content; what is there already is not asked again.

    Raises:
        MissingDependencyError: ``openai`` is not installed.
        EnvironmentFaultError: There is no key.
    """

    def __init__(self, endpoint: Endpoint, journal: ResumeJournal) -> None:
        self._endpoint = endpoint
        self._journal = journal
        self._replies = {entry["key"]: str(entry["reply"]) for _, entry in journal.entries()}
        self._client = _client(endpoint)
        self._lock = threading.Lock()
        self.asked = 0
        self.remembered = 0

    def ask(self, messages: Sequence[Message]) -> str:
        """Return the model's reply.

        Args:
            messages: The conversation so far, roles and contents.

        Returns:
            What it wrote; empty where it wrote nothing.

        Raises:
            EndpointRefusedError: This request will not be answered.
            InterruptedRunError: The endpoint failed again and again.
            EnvironmentFaultError: The key, the address or the model's name is wrong.
        """
        key = self._key(messages)
        with self._lock:
            if key in self._replies:
                self.remembered += 1
                return self._replies[key]
        reply = self._request(messages)
        with self._lock:
            self.asked += 1
            if reply:
                self._replies[key] = reply
                self._journal.append({"key": key, "model": self._endpoint.model, "reply": reply})
        return reply

    def _key(self, messages: Sequence[Message]) -> str:
        content = [self._endpoint.model, self._endpoint.temperature, [dict(message) for message in messages]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _request(self, messages: Sequence[Message]) -> str:
        from openai import APIError

        expected: list[Any] = [dict(message) for message in messages]
        try:
            answer = self._client.chat.completions.create(
                model=self._endpoint.model, messages=expected, temperature=self._endpoint.temperature
            )
        except APIError as error:
            raise self._fault(error) from error
        # Not every service keeps to the form: some send an error as an answer without choices.
        return (answer.choices[0].message.content or "") if answer.choices else ""

    def _fault(self, error: APIError) -> LlavarError:
        from openai import APIStatusError

        where = f"{self._client.base_url} {self._endpoint.model}"
        said = str(error)[:300]
        status = error.status_code if isinstance(error, APIStatusError) else None
        if status in _THIS_REQUEST:
            return EndpointRefusedError.at(where, f"refused ({said})", "leave the picture out")
        if status in _OURS_TO_MEND:
            return EnvironmentFaultError.at(where, said, f"check --model, --base-url and {self._endpoint.key_variable}")
        return InterruptedRunError.at(
            where,
            f"failed {self._endpoint.tries + 1} times in a row ({said})",
            "run the same command again later: what is answered is kept",
        )


def _client(endpoint: Endpoint) -> OpenAI:
    try:
        from openai import OpenAI
    except ImportError as error:
        raise MissingDependencyError.at(
            "openai", f"is not installed ({error})", "pip install 'llavar-peft[eval]'"
        ) from error
    key = os.environ.get(endpoint.key_variable)
    if not key:
        raise EnvironmentFaultError.at(
            endpoint.key_variable, "is not set", "export the endpoint's key (for a local one, any text)"
        )
    return OpenAI(api_key=key, base_url=endpoint.base_url, max_retries=endpoint.tries, timeout=endpoint.timeout)
