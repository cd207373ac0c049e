"""``llavar-peft ask``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llavar_peft.cli._output import say, say_json
from llavar_peft.config import Quantization
from llavar_peft.types import ImageMode


def ask(
    question: Annotated[str, typer.Argument(help="In plain words.", metavar="QUESTION")],
    model: Annotated[Path, typer.Option("--model", help="A checkpoint's folder, or an adapter's.")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="A picture; several are asked about one by one.")
    ] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="An adapter's folder, laid over the model.")] = None,
    vision_tower: Annotated[
        str | None, typer.Option("--vision-tower", help="CLIP's folder, for a model in the released layout.")
    ] = None,
    quantize: Annotated[Quantization | None, typer.Option("--quantize", help="Store the base in 4 or 8 bits.")] = None,
    image_mode: Annotated[
        ImageMode | None, typer.Option("--image-mode", help="How pictures are prepared; default: the model's own.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens at most per answer.")] = 512,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 is greedy; 0.2 is the original's.")
    ] = 0.2,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Makes sampling repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")] = False,
) -> None:
    """Ask a trained model about pictures."""
    from llavar_peft.inference import load_reader

    pictures = image or []
    reader = load_reader(model, adapter=adapter, vision_tower=vision_tower, quantize=quantize)
    answers = reader.ask(
        pictures,
        question,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        image_mode=image_mode,
    )
    names: list[str | None] = [str(picture) for picture in pictures] or [None]
    if as_json:
        say_json([{"image": name, "answer": answer} for name, answer in zip(names, answers, strict=True)])
        return
    for name, answer in zip(names, answers, strict=True):
        say(f"{name}: {answer}" if len(names) > 1 else answer)
