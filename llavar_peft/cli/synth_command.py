"""``llavar-peft synth``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import typer

from llavar_peft.cli.output import say, show_count
from llavar_peft.cli.shared_options import WorkersOption
from llavar_peft.errors import count_of


class SynthKind(str, Enum):
    """The kinds of image. This is an enumeration because typer does not support lists of literals."""

    RECEIPTS = "receipts"
    COVERS = "covers"
    SIGNS = "signs"
    POSTERS = "posters"
    DOCUMENTS = "documents"
    INVOICES = "invoices"


def synth(
    out: Annotated[Path, typer.Option("--out", help="The folder for the images, records.json and truth.jsonl.")],
    count: Annotated[int, typer.Option("--n", min=1, help="Number of images.")] = 100,
    kind: Annotated[
        list[SynthKind] | None,
        typer.Option(
            "--kind", help="The kind of image. Repeat the option to alternate between kinds. Default: all but invoices."
        ),
    ] = None,
    style: Annotated[
        Literal["detailed", "plain"],
        typer.Option(
            "--style",
            help="detailed has small print and words of a language. plain has a few large letters, random words and no "
            "documents, as in the quickstart.",
        ),
    ] = "detailed",
    language: Annotated[
        list[str] | None,
        typer.Option(
            "--language",
            help="The language of the words: de, el, en, es, fr, it, pl or ru. Repeat the option to alternate. "
            "Default: en.",
        ),
    ] = None,
    distort: Annotated[
        Literal["none", "light", "heavy"],
        typer.Option("--distort", help="Distortion of the images, as by a camera."),
    ] = "none",
    width: Annotated[
        int | None,
        typer.Option(
            "--width",
            min=256,
            max=4096,
            help="Width of the images in pixels; in plain style, the length of their longer side at most. "
            "Default: 768, plain 448.",
        ),
    ] = None,
    fonts: Annotated[
        Path | None, typer.Option("--fonts", help="A folder of additional fonts (.ttf, .otf or .ttc).")
    ] = None,
    task: Annotated[
        Literal["transcribe", "question", "conversation", "extract"],
        typer.Option(
            "--task",
            help="What a record asks for: all text, one answer, all answers in a conversation, or the fields of "
            "receipts and invoices as JSON.",
        ),
    ] = "transcribe",
    heights: Annotated[
        str | None,
        typer.Option(
            "--heights",
            help="Heights in pixels, e.g. 3-19 or 3,5,7, that the letters of a record's first answer have in the image "
            "that the model sees. Each image is placed on a larger square to this end.",
        ),
    ] = None,
    side: Annotated[
        int, typer.Option("--side", help="With --heights: side in pixels of the image that the model sees.")
    ] = 336,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the images.")] = 0,
    workers: WorkersOption = None,
) -> None:
    """Draw receipts, covers, signs, posters, documents and invoices, with the text and position of every line."""
    from llavar_peft.data.letter_canvas import parse_heights
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
        heights=parse_heights(heights) if heights else (),
        side=side,
    )
    with show_count("drawing") as progress:
        result = write_synthetic(out, count, settings, workers, progress)
    say(f"images    {result.images}: {result.image_count}, with {count_of(result.lines, 'line')} of text")
    say(f"records   {result.records}")
    say(f"truth     {result.truth}")
