"""``llavar-peft ocr``."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from llavar_peft.cli.output import resumable, say, say_json, show_count
from llavar_peft.cli.shared_options import JsonOption, SchemaOption, WorkersOption, read_schema
from llavar_peft.errors import ConfigError, count_of

_LOG = logging.getLogger(__name__)


def ocr_build(
    images: Annotated[
        Path,
        typer.Argument(
            help="A folder of images and PDF documents. Its sub-folders are searched too.", metavar="IMAGES"
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The records file to write (.json).")],
    engine: Annotated[
        Literal["rapidocr", "tesseract"],
        typer.Option("--engine", help="The OCR engine whose text becomes the answer."),
    ] = "rapidocr",
    both: Annotated[
        bool, typer.Option("--both", help="Read with the other engine too, and drop images on which they disagree.")
    ] = False,
    profile: Annotated[
        Literal["auto", "scene", "page", "paper"],
        typer.Option(
            "--profile",
            help="How large images are read: page in full size, scene and paper with a shorter side of 384 pixels, as "
            "in the paper; auto decides for each image whether it is a page or a scene.",
        ),
    ] = "auto",
    short_edge: Annotated[
        int | None,
        typer.Option(
            "--short-edge",
            min=0,
            help="Resize the shorter side of all images to this many pixels instead; 0 keeps the full size.",
        ),
    ] = None,
    min_confidence: Annotated[
        float, typer.Option("--min-confidence", min=0, max=1, help="Drop lines with a lower confidence.")
    ] = 0.5,
    min_letters: Annotated[
        int, typer.Option("--min-letters", min=1, help="Drop images with fewer letters and digits.")
    ] = 5,
    script: Annotated[
        str | None,
        typer.Option("--script", help="Keep only text in this script, e.g. latin, cyrillic or cjk. Default: any."),
    ] = None,
    max_disagreement: Annotated[
        float,
        typer.Option(
            "--max-disagreement",
            min=0,
            max=1,
            help="With --both: largest accepted character error rate between the two engines.",
        ),
    ] = 0.3,
    languages: Annotated[
        str, typer.Option("--languages", help="Tesseract's languages, by its own codes, e.g. eng+deu.")
    ] = "eng",
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Keep images that are copies of another one.")
    ] = False,
    on_bad_image: Annotated[
        Literal["skip", "stop"], typer.Option("--on-bad-image", help="What to do about a broken image.")
    ] = "skip",
    pages: Annotated[
        str | None,
        typer.Option("--pages", help="Pages of each PDF document, e.g. 1-3,7 or 2-. Default: all.", metavar="PAGES"),
    ] = None,
    max_pages: Annotated[
        int, typer.Option("--max-pages", min=1, help="Largest number of pages of each PDF document.")
    ] = 1000,
    page_text: Annotated[
        bool,
        typer.Option(
            "--page-text/--no-page-text",
            help="Use the text that a page of a PDF document has itself, instead of reading the page as an image.",
        ),
    ] = True,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the random instruction of each record.")] = 0,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read the text in images by OCR, and write training records.

    Run the same command again to resume.
    """
    from llavar_peft.datagen.ocr.build_ocr_records import BuildSettings, build_records, report_path
    from llavar_peft.datagen.ocr.ocr_quality import QualityLimits
    from llavar_peft.datagen.ocr.read_image_folder import ReadingSettings
    from llavar_peft.page.ocr_page import write_ocr_page

    if short_edge is not None and profile != "auto":
        raise ConfigError.at("ocr build", f"--short-edge is given with --profile {profile}", "leave one of them out")
    settings = BuildSettings(
        reading=ReadingSettings(
            engine=engine, both=both, profile=profile, short_edge=short_edge, languages=languages, page_text=page_text
        ),
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
        pages=pages,
        most_pages=max_pages,
    )
    with resumable(out), show_count("reading") as progress:
        report = build_records(images, out, settings, progress)
    page = write_ocr_page(out)
    if as_json:
        say_json(report.as_dict())
    else:
        say(report.table())
        say(f"records  {out}")
        say(f"report   {report_path(out)}, {page}")
    if warning := report.warning():
        _LOG.warning("%s", warning)


def ocr_converse(
    records: Annotated[
        Path,
        typer.Argument(help="Records of 'ocr build', preferably with --both.", metavar="RECORDS"),
    ],
    out: Annotated[Path, typer.Option("--out", help="The records file to write (.json).")],
    model: Annotated[str, typer.Option("--model", help="The language model's name at the endpoint.")],
    base_url: Annotated[
        str | None,
        typer.Option(
            "--base-url", help="The URL of an OpenAI-compatible endpoint. Default: OPENAI_BASE_URL, else OpenAI."
        ),
    ] = None,
    key_variable: Annotated[
        str, typer.Option("--key-variable", help="The environment variable that contains the API key.")
    ] = "OPENAI_API_KEY",
    task: Annotated[
        Literal["converse", "extract"],
        typer.Option("--task", help="What to write: a conversation, or the fields of a form as JSON (with --schema)."),
    ] = "converse",
    schema: SchemaOption = None,
    captions: Annotated[
        Path | None,
        typer.Option("--captions", help="Captions of the images: a JSON object by image path, or JSON lines."),
    ] = None,
    caption_model: Annotated[
        str | None,
        typer.Option(
            "--caption-model",
            help="A model that sees images: it writes missing captions, of images whose text was painted over.",
        ),
    ] = None,
    caption_base_url: Annotated[
        str | None, typer.Option("--caption-base-url", help="The URL of its endpoint. Default: that of --base-url.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="The folder of the images to caption. Default: the one that 'ocr build' read."),
    ] = None,
    turns: Annotated[int, typer.Option("--turns", min=1, help="Largest number of questions about an image.")] = 5,
    least: Annotated[int, typer.Option("--least", min=1, help="Drop conversations with fewer valid questions.")] = 2,
    attempts: Annotated[int, typer.Option("--attempts", min=1, help="Largest number of requests for an image.")] = 3,
    temperature: Annotated[float, typer.Option("--temperature", min=0, max=2, help="Sampling temperature.")] = 0.7,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Number of requests at the same time.")] = 4,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed that places each image before or after its first question.")
    ] = 0,
    as_json: JsonOption = False,
) -> None:
    """Let a language model write conversations about the text that 'ocr build' read.

    Its answers are checked against that text. Run the same command again to resume.
    """
    from llavar_peft.datagen.ocr.make_conversations import ConverseSettings, make_conversations, read_captions
    from llavar_peft.datagen.openai_client import Endpoint

    if (task == "extract") != (schema is not None):
        what = f"--task {task} is given {'without' if schema is None else 'with'} --schema"
        raise ConfigError.at("ocr converse", what, "give --task extract and --schema FILE together, or neither")
    endpoint = Endpoint(model=model, base_url=base_url, key_variable=key_variable, temperature=temperature)
    settings = ConverseSettings(
        endpoint=endpoint,
        caption_endpoint=replace(endpoint, model=caption_model, base_url=caption_base_url or base_url)
        if caption_model
        else None,
        images=images,
        least=least,
        most=max(turns, least),
        attempts=attempts,
        seed=seed,
        concurrency=concurrency,
        schema=read_schema(schema),
    )
    with resumable(out), show_count("conversing") as progress:
        report = make_conversations(records, out, settings, read_captions(captions) if captions else None, progress)
    if as_json:
        say_json(report.as_dict())
        return
    conversations, about = count_of(report.kept, "conversation"), count_of(report.images, "image")
    say(f"{out}: {conversations} about {about}, {count_of(report.turns, 'question')}")
    say(f"{report.asked} new requests, {report.remembered} from the cache; {report.repaired} conversations repaired")
    for reason, count in report.as_dict()["dropped"].items():
        say(f"{count} dropped: {reason}")


def ocr_select(
    records: Annotated[Path, typer.Argument(help="Records of 'ocr build'.", metavar="RECORDS")],
    out: Annotated[Path, typer.Option("--out", help="The records file to write (.json).")],
    min_lines: Annotated[int, typer.Option("--min-lines", min=0, help="Drop images with fewer lines of text.")] = 1,
    min_share: Annotated[
        float,
        typer.Option("--min-share", min=0, max=1, help="Drop images of which text covers less than this share."),
    ] = 0.0,
    clip: Annotated[
        Path | None, typer.Option("--clip", help="The folder of a CLIP that decides which category an image has.")
    ] = None,
    category: Annotated[
        list[str] | None,
        typer.Option("--category", help="A category for --clip, e.g. 'book cover'. Repeat the option for each."),
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", help="Keep only this category. Repeat the option for each.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", help="The folder of the images. Default: the one that 'ocr build' read."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Select records by how much text their images hold, and by their categories as a CLIP sees them."""
    from llavar_peft.datagen.ocr.image_categories import OTHER
    from llavar_peft.datagen.ocr.select_records import SelectSettings, select_records

    categories, kept = tuple(category or ()), tuple(keep or ())
    if (clip is None) != (len(categories) < 2):
        fix = "give --clip FOLDER and at least two of --category together, or neither"
        raise ConfigError.at("ocr select", "--clip and --category are not given together", fix)
    if unknown := sorted({*kept} - {*categories, OTHER}):
        raise ConfigError.at("--keep", f"is no category (got {unknown[0]!r})", "name one of those of --category")
    settings = SelectSettings(
        min_lines=min_lines, min_share=min_share, clip=clip, categories=categories, keep=kept, images=images
    )
    with show_count("selecting") as progress:
        report = select_records(records, out, settings, progress)
    if as_json:
        say_json(vars(report))
        return
    say(f"{out}: {report.kept} of {count_of(report.records, 'record')}")
    for name, count in report.categories.most_common():
        say(f"{count} {name}")
    for reason, count in report.dropped.most_common():
        say(f"{count} dropped: {reason}")
