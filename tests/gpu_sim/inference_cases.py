"""Cases that answer questions: a run's result on a device, directly, in a conversation, and behind the server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from llavar_peft import Chat, load_chat
from llavar_peft.inference.token_sampling import Sampling
from llavar_peft.models.tuning import is_quantized
from llavar_peft.recipe.schema import Dtype
from llavar_peft.serving.api.api_app import create_app
from tests.serving.server import ask_body, call, data_url

_SAMPLINGS = (
    Sampling(temperature=0.0, max_new_tokens=4, logprobs=True),
    Sampling(temperature=0.8, top_p=0.9, top_k=20, seed=1, max_new_tokens=4),
)


def answer(result: str, image: str, device: str, dtype: Dtype) -> dict[str, Any]:
    """Return a result's answers, greedy and sampled, with its adapter and without, in a batch and in a conversation."""
    chat = load_chat(result, device=device, dtype=dtype)
    requests = [
        chat.request(image, question, adapter=adapter, sampling=sampling)
        for adapter in (*chat.adapters, None)
        for question, sampling in zip(("What does it say?", "Which colour?"), _SAMPLINGS, strict=True)
    ]
    answers = chat.answer(requests)
    dialogue = chat.conversation(image)
    turns = [dialogue.send(text, temperature=0.0, max_new_tokens=3) for text in ("What?", "And then?")]
    return {
        "device": str(chat.engine.device),
        "quantized": is_quantized(chat.engine.base_model),
        "ids": [list(one.ids) for one in answers],
        "logprobs": [list(one.logprobs or ()) for one in answers],
        "turns": turns,
        "served": _serve(chat, image),
    }


def _serve(chat: Chat, image: str) -> str:
    app = create_app(chat.engine, name="tiny")
    shown = data_url(Path(image).read_bytes())

    async def ask() -> str:
        async with app.router.lifespan_context(app):
            reply = await call(app, ask_body("What does it say?", shown, model=chat.adapters[0]))
        assert reply.status == 200, reply.body
        return str(reply.json["choices"][0]["message"]["content"])

    return asyncio.run(ask())
