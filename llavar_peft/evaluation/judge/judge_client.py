"""A judge at an OpenAI-compatible endpoint, which keeps its replies and scores each prompt only once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavar_peft.data.resume_journal import ReplyFolder
from llavar_peft.datagen.openai_client import ChatClient, Endpoint, EndpointError
from llavar_peft.errors import ConfigError, EnvironmentFaultError, LlavarError
from llavar_peft.evaluation.judge.judge_cases import SYSTEM
from llavar_peft.evaluation.judge.judge_reviews import Scores
from llavar_peft.evaluation.judge.judge_scores import is_refusal, parse_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """Which judge to ask, and how.

    The defaults of temperature and length are the original's. The other fields are explained at ``Endpoint``.

    Attributes:
        attempts: Maximum number of requests for one prompt while replies contain no scores.
        retries: ``Endpoint.tries``.
        concurrency: Maximum number of simultaneous requests.

    Source: LLaVAR, llava/eval/eval_gpt_review_visual.py.
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
    """The result of asking the judge one prompt.

    Attributes:
        content: The judge's last reply.
        scores: In the order of the prompt; None if no reply contained scores.
        sent: Number of requests that were answered; 0 if the reply was kept from an earlier run.
        malformed: Number of replies that are neither scores nor refusals.
        refused: Number of refusals by the judge or a content filter, and of requests that the endpoint rejected.
        rejection: The error, if the endpoint rejected the request.
    """

    content: str
    scores: Scores | None
    sent: int = 0
    malformed: int = 0
    refused: int = 0
    rejection: LlavarError | None = None


class Judge:
    """A judge that keeps its replies; safe for use by several threads.

    Args:
        config: Which judge, and how to ask it.
        cache: Folder of the replies that contain scores; several runs may share it.

    Raises:
        MissingDependencyError: ``openai`` is not installed.
        ConfigError: The API key is not set.
    """

    def __init__(self, config: JudgeConfig, cache: Path) -> None:
        self.config = config
        self._replies = ReplyFolder(cache)
        endpoint = Endpoint(
            model=config.model,
            base_url=config.base_url,
            temperature=config.temperature,
            max_tokens=config.max_tokens,
            tries=config.retries,
            timeout=config.timeout,
        )
        try:
            self._client = ChatClient(endpoint)
        except EnvironmentFaultError as error:
            raise ConfigError(str(error), error.faults) from None

    def ask(self, prompt: str) -> JudgeVerdict:
        """Return the judge's scores for a prompt, asking again while its replies contain none.

        A prompt that the endpoint rejects, for example because it is too long, gets no scores.

        Raises:
            ConfigError: The key, the address or the judge's name is wrong.
            EnvironmentFaultError: The endpoint cannot be reached, or keeps failing.
        """
        body = self._client.request_body([{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt}])
        hashed = json.dumps({"base_url": self.config.base_url, **body}, sort_keys=True)
        key = hashlib.sha256(hashed.encode()).hexdigest()
        known = self._read_kept(key)
        if known is not None:
            return JudgeVerdict(known, parse_scores(known))
        content, refused = "", 0
        for attempt in range(1, self.config.attempts + 1):
            try:
                reply = self._client.send(body)
                content, declined = reply.content or reply.refusal, reply.refused
            except EndpointError as error:
                if error.filtered:
                    content, declined = "", True
                elif error.kind == "rejected":
                    fault = self._describe(error)
                    return JudgeVerdict(str(fault), None, attempt, attempt - 1 - refused, refused + 1, fault)
                else:
                    raise self._describe(error) from error
            scores = parse_scores(content)
            if scores is not None:
                self._replies.write(key, {"request": body, "reply": content})
                return JudgeVerdict(content, scores, attempt, attempt - 1 - refused, refused)
            refused += declined or is_refusal(content)
        return JudgeVerdict(content, None, self.config.attempts, self.config.attempts - refused, refused)

    def _read_kept(self, key: str) -> str | None:
        kept: Any = self._replies.read(key)
        reply = kept.get("reply") if isinstance(kept, dict) else None
        return reply if isinstance(reply, str) and parse_scores(reply) is not None else None

    def _describe(self, error: EndpointError) -> LlavarError:
        if error.kind == "unavailable":
            return EnvironmentFaultError.at(
                self._client.address, f"the judge cannot be reached ({error})", "fix the connection, and run again"
            )
        return ConfigError.at(
            "the judge's endpoint", f"rejects the request ({error})", "correct the key, the judge's name or the address"
        )
