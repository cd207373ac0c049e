"""``llavar-peft ask``."""

from __future__ import annotations

from typing import Annotated

import typer

from llavar_peft.cli.output import say, say_json
from llavar_peft.cli.shared_options import (
    AdapterOption,
    GreedyOption,
    ImageModeOption,
    JsonOption,
    MaxNewTokensOption,
    ModelOption,
    QuantizeOption,
    SeedOption,
    TemperatureOption,
    VisionTowerOption,
    make_sampling,
    open_image_or_url,
)


def ask(
    question: Annotated[str, typer.Argument(help="The question.", metavar="QUESTION")],
    model: ModelOption,
    image: Annotated[
        list[str] | None,
        typer.Option(
            "--image",
            help="An image file or http(s) URL. Repeat the option to ask about several images, one by one.",
            metavar="FILE|URL",
        ),
    ] = None,
    adapter: AdapterOption = None,
    vision_tower: VisionTowerOption = None,
    quantize: QuantizeOption = None,
    image_mode: ImageModeOption = None,
    max_new_tokens: MaxNewTokensOption = 512,
    temperature: TemperatureOption = None,
    greedy: GreedyOption = False,
    seed: SeedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask a model a question about images."""
    from llavar_peft.inference.chat import load_chat

    sampling = make_sampling(max_new_tokens, temperature, greedy, seed)
    names: list[str | None] = [*image] if image else [None]
    images = [None if name is None else open_image_or_url(name) for name in names]
    chat = load_chat(model, adapter, vision_tower=vision_tower, quantize=quantize)
    requests = [chat.request(shown, question, image_mode=image_mode, sampling=sampling) for shown in images]
    answers = [answer.text for answer in chat.answer(requests)]
    if as_json:
        say_json([{"image": name, "answer": answer} for name, answer in zip(names, answers, strict=True)])
        return
    for name, answer in zip(names, answers, strict=True):
        say(f"{name}: {answer}" if len(names) > 1 else answer)
