"""``llavar-peft ocr``: records out of images that nobody has labelled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llavar_peft.cli.output import say, say_json, show_count


def build(
    images: Annotated[Path, typer.Argument(help="A folder of pictures, searched with all below it.", metavar="IMAGES")],
    out: Annotated[Path, typer.Option("--out", help="The records' file to write, .json.")],
    engine: Annotated[
        Literal["rapidocr", "tesseract"], typer.Option("--engine", help="Whose reading becomes the answer.")
    ] = "rapidocr",
    both: Annotated[
        bool, typer.Option("--both", help="Read with the other engine too, and drop what they disagree on.")
    ] = False,
    short_edge: Annotated[
        int, typer.Option("--short-edge", min=0, help="Pixels that the shorter side is brought to first; 0: full size.")
    ] = 384,
    min_confidence: Annotated[
        float, typer.Option("--min-confidence", min=0, max=1, help="Lines below it are left out.")
    ] = 0.5,
    min_letters: Annotated[int, typer.Option("--min-letters", min=1, help="Letters and digits of a record.")] = 5,
    script: Annotated[
        str | None, typer.Option("--script", help="Keep what is written in it, e.g. latin, cyrillic, cjk.")
    ] = None,
    max_disagreement: Annotated[
        float, typer.Option("--max-disagreement", min=0, max=1, help="Character error rate of two engines at most.")
    ] = 0.3,
    languages: Annotated[
        str, typer.Option("--languages", help="That Tesseract reads, in its spelling, e.g. eng+deu.")
    ] = "eng",
    keep_duplicates: Annotated[bool, typer.Option("--keep-duplicates", help="Copies become records too.")] = False,
    on_bad_image: Annotated[
        Literal["skip", "stop"], typer.Option("--on-bad-image", help="What a broken picture does.")
    ] = "skip",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws each record's instruction.")] = 0,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Processes; default: one for each CPU.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")] = False,
) -> None:
    """Read images and write records in the released format; killed, it goes on where it was."""
    from llavar_peft.datagen.ocr.build_ocr_records import BuildSettings, build_records, report_path
    from llavar_peft.datagen.ocr.ocr_quality import QualityLimits
    from llavar_peft.datagen.ocr.read_image_folder import ReadingSettings
    from llavar_peft.page.ocr_page import write_ocr_page

    settings = BuildSettings(
        reading=ReadingSettings(engine=engine, both=both, short_edge=short_edge, languages=languages),
        limits=QualityLimits(
            min_confidence=min_confidence,
            min_letters=min_letters,
            script=script.upper() if script else None,
            max_disagreement=max_disagreement,
        ),
        seed=seed,
        keep_duplicates=keep_duplicates,
        workers=workers,
        on_bad_image=on_bad_image,
    )
    with show_count("reading") as progress:
        report = build_records(images, out, settings, progress)
    page = write_ocr_page(out)
    if as_json:
        say_json(report.as_dict())
        return
    say(report.table())
    say(f"records  {out}")
    say(f"report   {report_path(out)}, {page}")


def converse(
    records: Annotated[
        Path,
        typer.Argument(help="What ocr build wrote, best with --both; its readings lie beside it.", metavar="RECORDS"),
    ],
    out: Annotated[Path, typer.Option("--out", help="The conversations' file to write, .json.")],
    model: Annotated[str, typer.Option("--model", help="The language model's name at the endpoint.")],
    base_url: Annotated[
        str | None,
        typer.Option("--base-url", help="Of an OpenAI-compatible endpoint; default: OPENAI_BASE_URL, else OpenAI's."),
    ] = None,
    key_variable: Annotated[
        str, typer.Option("--key-variable", help="Environment variable that holds the endpoint's key.")
    ] = "OPENAI_API_KEY",
    captions: Annotated[
        Path | None, typer.Option("--captions", help="JSON object of captions by picture, or JSON lines.")
    ] = None,
    turns: Annotated[int, typer.Option("--turns", min=1, help="Questions about each picture at most.")] = 5,
    least: Annotated[int, typer.Option("--least", min=1, help="Questions that must be sound.")] = 2,
    attempts: Annotated[int, typer.Option("--attempts", min=1, help="Requests for one picture at most.")] = 3,
    temperature: Annotated[float, typer.Option("--temperature", min=0, max=2, help="Of sampling.")] = 0.7,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests at a time.")] = 4,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws the place of the picture.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")] = False,
) -> None:
    """Have a language model write conversations from what was read; each answer is held to it."""
    from llavar_peft.datagen.ocr.make_conversations import ConverseSettings, read_captions
    from llavar_peft.datagen.ocr.make_conversations import make_conversations as make
    from llavar_peft.datagen.openai_client import Endpoint

    settings = ConverseSettings(
        endpoint=Endpoint(model=model, base_url=base_url, key_variable=key_variable, temperature=temperature),
        least=least,
        most=max(turns, least),
        attempts=attempts,
        seed=seed,
        concurrency=concurrency,
    )
    with show_count("conversing") as progress:
        report = make(records, out, settings, read_captions(captions) if captions else None, progress)
    if as_json:
        say_json(report.as_dict())
        return
    say(f"{out}: {report.kept} conversations of {report.images} pictures, {report.turns} questions")
    say(f"{report.asked} requests, {report.remembered} answered before; {report.repaired} conversations repaired")
    for outcome, count in report.as_dict()["dropped"].items():
        say(f"{count} left out: {outcome}")
