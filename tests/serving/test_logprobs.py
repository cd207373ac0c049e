"""Log-probabilities in OpenAI's format: tokens as text, and bytes that join to the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest
import torch
from openai.types.chat import ChatCompletionTokenLogprob

from llavar_peft import Chat
from tests.serving.server import MODEL, serving

PIECES = ("<0xC3>", "<0xA9>", "▁the", ".", "<im_patch>")  # é is two bytes
HOT: dict[str, Any] = {
    "model": MODEL, "messages": [{"role": "user", "content": "Go on."}], "temperature": 2.0, "seed": 5, "n": 8,
    "max_tokens": 40, "logprobs": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def client(chat: Chat) -> Iterator[openai.OpenAI]:
    """A client of a server whose model generates only these pieces, with equal probabilities."""
    pieces = chat.engine.processor.tokenizer.convert_tokens_to_ids(list(PIECES))

    def only_these(_module: object, _inputs: object, logits_BTV: torch.Tensor) -> torch.Tensor:
        only = torch.full_like(logits_BTV, -1e4)
        only[..., pieces] = 0
        return only

    hook = chat.engine.base_model.lm_head.register_forward_hook(only_these)
    with serving(chat) as (address, _):
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
    hook.remove()


def _check(content: Sequence[ChatCompletionTokenLogprob], text: str) -> None:
    parts = [bytes(one.bytes or []) for one in content]
    assert b"".join(parts) == text.encode()
    assert all(parts)
    for one, part in zip(content, parts, strict=True):
        half = len(part) == 1 and part[0] > 127  # part of a character, which OpenAI escapes
        assert one.token == (f"\\x{part[0]:02x}" if half else part.decode())
        assert one.logprob <= 0
        assert one.top_logprobs == []


def test_bytes_join_to_the_answer_with_and_without_streaming(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(**HOT)
    texts = [choice.message.content or "" for choice in done.choices]
    listed = [choice.logprobs.content or [] for choice in done.choices if choice.logprobs]
    for content, text in zip(listed, texts, strict=True):
        _check(content, text)
    assert done.usage is not None
    assert 0 < sum(map(len, listed)) < done.usage.completion_tokens  # image tokens are not text
    parts = "".join(one.token for content in listed for one in content)
    assert "\\xc3\\xa9" in parts  # é
    assert "\ufffd" in parts  # incomplete characters
    assert " the" in parts

    streamed: list[list[ChatCompletionTokenLogprob]] = [[] for _ in texts]
    grown = ["" for _ in texts]
    for chunk in client.chat.completions.create(stream=True, **HOT):
        for choice in chunk.choices:
            grown[choice.index] += choice.delta.content or ""
            if choice.logprobs is not None:
                streamed[choice.index] += choice.logprobs.content or []
    assert grown == texts
    for content, expected in zip(streamed, listed, strict=True):
        assert [(one.token, one.bytes) for one in content] == [(one.token, one.bytes) for one in expected]


def test_a_stop_text_has_no_log_probabilities(client: openai.OpenAI) -> None:
    free = client.chat.completions.create(**HOT).choices[0].message.content or ""
    stop = free[len(free) // 2 :][:2]
    cut = client.chat.completions.create(**HOT, stop=[stop]).choices[0]
    assert cut.message.content == free.partition(stop)[0].rstrip()
    assert cut.logprobs is not None
    _check(cut.logprobs.content or [], cut.message.content or "")


def test_alternatives_are_rejected(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="top_logprobs is not supported"):
        client.chat.completions.create(**HOT, top_logprobs=2)
    assert client.chat.completions.create(**HOT, top_logprobs=0).choices[0].logprobs
