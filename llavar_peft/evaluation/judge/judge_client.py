"""One judge at an OpenAI-compatible endpoint: asked patiently, and never twice for the same."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from llavar_peft.atomic_files import write_json
from llavar_peft.errors import ConfigError, EnvironmentFaultError, LlavarError, MissingDependencyError
from llavar_peft.evaluation.judge.judge_cases import SYSTEM
from llavar_peft.evaluation.judge.judge_reviews import Scores
from llavar_peft.evaluation.judge.judge_scores import is_refusal, parse_scores

if TYPE_CHECKING:
    from openai import OpenAI

KEY_VARIABLE: Final = "OPENAI_API_KEY"
_REFUSALS: Final = frozenset({401, 403, 404})
_REJECTIONS: Final = frozenset({400, 413, 422})  # too long, or with something in it: one request's own affair


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """Who is asked, and how.

    Attributes:
        model: The judge's name at the endpoint.
        base_url: The endpoint; None is the client's own choice.
        temperature: The original's is 0.2.
        max_tokens: Of a reply; the original's is 1024.
        attempts: How often a question is asked whose reply has no scores in it.
        retries: How often a request is sent again that a server refused or lost; the client waits in between, as long
            as ``Retry-After`` says, else longer each time. More than two minutes end the run, to go on later.
        concurrency: Requests under way at once.
        timeout: Seconds that a reply may take.
    """

    model: str
    base_url: str | None = None
    temperature: float = 0.2
    max_tokens: int = 1024
    attempts: int = 3
    retries: int = 8
    concurrency: int = 4
    timeout: float = 120.0


@dataclass(frozen=True, slots=True)
class JudgeVerdict:
    """What came of asking one thing.

    Attributes:
        content: The judge's last words.
        scores: In the order of the prompt; None where no attempt gave any.
        sent: Requests that were answered; 0 where the answer was known.
        malformed: Replies without scores that are no refusals.
        refused: Replies in which the judge, or a filter before it, refused, and requests that the endpoint would not
            take.
        rejection: Why the endpoint would not take it.
    """

    content: str
    scores: Scores | None
    sent: int = 0
    malformed: int = 0
    refused: int = 0
    rejection: LlavarError | None = None


class _RejectedError(Exception):
    """The endpoint will not take this request, whoever sends it."""


class Judge:
    """A judge with a memory.

    Args:
        config: Who, and how.
        cache: Folder of the replies that had scores, one file for each request. It may be shared between runs.

    Raises:
        MissingDependencyError: ``openai`` is not installed.
        ConfigError: There is no key in the environment.
    """

    def __init__(self, config: JudgeConfig, cache: Path) -> None:
        self.config = config
        self.cache = cache
        self._client = _client(config)

    def ask(self, prompt: str) -> JudgeVerdict:
        """Ask one thing, again where the reply has no scores in it, unless its reply is known.

        Args:
            prompt: The user's message.

        Returns:
            The reply and its scores. A request that the endpoint would not take (too long, say) has none.

        Raises:
            ConfigError: The endpoint refuses the key or the model's name.
            EnvironmentFaultError: It cannot be reached, or gives up.
        """
        request = {
            "model": self.config.model,
            "messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": _sendable(prompt)}],
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
        }
        place = self._place(request)
        known = _recall(place)
        if known is not None:
            return JudgeVerdict(known, parse_scores(known))
        content, refused = "", 0
        for attempt in range(1, self.config.attempts + 1):
            try:
                content, declined = self._send(request)
            except _RejectedError as error:
                fault = _refusal(error)
                return JudgeVerdict(str(fault), None, attempt, attempt - 1 - refused, refused + 1, fault)
            scores = parse_scores(content)
            if scores is not None:
                write_json(place, {"request": request, "reply": content})
                return JudgeVerdict(content, scores, attempt, attempt - 1 - refused, refused)
            refused += declined or is_refusal(content)
        return JudgeVerdict(content, None, self.config.attempts, self.config.attempts - refused, refused)

    def _place(self, request: dict[str, Any]) -> Path:
        text = json.dumps({"base_url": self.config.base_url, **request}, sort_keys=True)
        return self.cache / f"{hashlib.sha256(text.encode()).hexdigest()}.json"

    def _send(self, request: dict[str, Any]) -> tuple[str, bool]:
        """Return the reply, and whether it is a refusal."""
        import openai

        try:
            reply = self._client.chat.completions.with_raw_response.create(**request)
        except openai.APIStatusError as error:
            if error.code == "content_filter":  # Azure's way of refusing
                return "", True
            if error.status_code in _REJECTIONS:
                raise _RejectedError(str(error)) from error
            if error.status_code in _REFUSALS:
                raise _refusal(error) from error
            raise _unreachable(error, str(self._client.base_url)) from error
        except openai.APIError as error:
            raise _unreachable(error, str(self._client.base_url)) from error
        return _read_reply(reply.http_response.content)


def _client(config: JudgeConfig) -> OpenAI:
    try:
        from openai import OpenAI
    except ImportError as error:
        raise MissingDependencyError.at("openai", "is not installed", "pip install 'llavar-peft[eval]'") from error
    key = os.environ.get(KEY_VARIABLE)
    if not key:
        raise ConfigError.at(
            KEY_VARIABLE, "is not set", "set it in the environment (to anything, for an endpoint that asks for no key)"
        )
    return OpenAI(api_key=key, base_url=config.base_url, max_retries=config.retries, timeout=config.timeout)


def _refusal(error: Exception) -> LlavarError:
    return ConfigError.at(
        "the judge's endpoint", f"refuses the request ({error})", "correct the key, the judge's name or the address"
    )


def _unreachable(error: Exception, address: str) -> LlavarError:
    return EnvironmentFaultError.at(
        address, f"the judge cannot be asked ({error})", "see to it, and run the same again"
    )


def _sendable(prompt: str) -> str:
    """Half a character, which a model may have answered with, cannot be sent."""
    return prompt.encode("utf-8", "replace").decode()


def _read_reply(content: bytes) -> tuple[str, bool]:
    """Find the words in a reply, and whether they are a refusal; in what is no reply (a proxy's page, say) none."""
    try:
        choice = json.loads(content)["choices"][0]
        words, refusal = choice["message"].get("content"), choice["message"].get("refusal")
        filtered = choice.get("finish_reason") == "content_filter"
    except (ValueError, LookupError, TypeError, AttributeError):
        return "", False
    told = words or refusal
    return told if isinstance(told, str) else "", bool(refusal) or filtered


def _recall(place: Path) -> str | None:
    """A reply of an earlier run; one that cannot be read any more is asked for again."""
    try:
        reply = json.loads(place.read_text(encoding="utf-8"))["reply"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return reply if isinstance(reply, str) and parse_scores(reply) is not None else None
