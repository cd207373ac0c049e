"""``llavar-peft synth``: text-rich images with exact ground truth."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import typer

from llavar_peft.cli.output import say, show_count


class SynthKind(str, Enum):
    """The kinds of image; an enumeration, since typer takes no list of literals."""

    RECEIPTS = "receipts"
    COVERS = "covers"
    SIGNS = "signs"
    POSTERS = "posters"
    DOCUMENTS = "documents"


def synth(
    out: Annotated[Path, typer.Option("--out", help="Folder that gets the pictures, records.json and truth.jsonl.")],
    count: Annotated[int, typer.Option("--n", min=1, help="How many pictures.")] = 100,
    kind: Annotated[
        list[SynthKind] | None,
        typer.Option("--kind", help="What they are; may be given again, then they take turns. Default: all."),
    ] = None,
    style: Annotated[
        Literal["detailed", "plain"],
        typer.Option(
            "--style",
            help="detailed: small print, words of a language; plain: a few large letters, random words, no documents, "
            "as the quickstart draws.",
        ),
    ] = "detailed",
    language: Annotated[
        list[str] | None,
        typer.Option("--language", help="de, el, en, es, fr, it, pl or ru; may be given again. Default: en."),
    ] = None,
    distort: Annotated[
        Literal["none", "light", "heavy"], typer.Option("--distort", help="What a camera does to them.")
    ] = "none",
    width: Annotated[
        int | None,
        typer.Option(
            "--width",
            min=256,
            max=4096,
            help="Of each picture, in pixels (default: 768); of a plain one the most that its longer side has (448).",
        ),
    ] = None,
    fonts: Annotated[
        Path | None, typer.Option("--fonts", help="A folder of further fonts, .ttf, .otf or .ttc.")
    ] = None,
    task: Annotated[
        Literal["transcribe", "question", "conversation"],
        typer.Option("--task", help="What a record asks: all text, one question, or all of them as a conversation."),
    ] = "transcribe",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Another one gives other pictures.")] = 0,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes; default: one for each CPU.")
    ] = None,
) -> None:
    """Draw receipts, covers, signs, posters and documents, with every line's text and place."""
    from llavar_peft.datagen.synth.synth_settings import SynthSettings
    from llavar_peft.datagen.synth.write_synthetic import write_synthetic

    settings = SynthSettings(
        style=style,
        kinds=tuple(one.value for one in kind or ()),
        seed=seed,
        width=width,
        distort=distort,
        languages=tuple(language or ["en"]),
        fonts=fonts,
        task=task,
    )
    with show_count("drawing") as progress:
        result = write_synthetic(out, count, settings, workers, progress)
    say(f"pictures  {result.images}: {result.image_count}, with {result.lines} lines of text")
    say(f"records   {result.records}")
    say(f"truth     {result.truth}")
