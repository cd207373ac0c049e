"""``llavar-peft data``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from llavar_peft.cli.output import make_safe, say, say_json, show_count, with_released_key
from llavar_peft.cli.resolution_table import HeightsOption, OcrSampleOption, find_texts, print_resolutions
from llavar_peft.cli.shared_options import ImagesOption, JsonOption, VisionTowerOption
from llavar_peft.errors import count_of

if TYPE_CHECKING:
    from rich.text import Text

    from llavar_peft.data.hub_sources import TableSelection
    from llavar_peft.types import Example

SplitOption: TypeAlias = Annotated[
    str | None, typer.Option("--split", help="The split of a folder or hub data set. Default: train.")
]
ConfigOption: TypeAlias = Annotated[
    str | None, typer.Option("--config", help="The configuration (subset) of a folder or hub data set.")
]
StreamingOption: TypeAlias = Annotated[
    bool, typer.Option("--streaming", help="Read a hub data set row by row, without downloading its files first.")
]
ColumnsOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--columns", metavar="NAME=COLUMN", help="The column of the id, image, question or answer, e.g. question=frage."
    ),
]
_RECORDS_HELP = "Files or folders of records, or hf://owner/name/config?split=train."
_RECORD_HELP = "A file or folder of records, or hf://owner/name/config?split=train."
_DEFAULT_LIMIT = 5
_INVALID_INPUT = 2  # exit status, as of all commands


def data_check(
    records: Annotated[list[Path], typer.Argument(help=_RECORDS_HELP, metavar="RECORDS...")],
    images: ImagesOption = None,
    split: SplitOption = None,
    config: ConfigOption = None,
    streaming: StreamingOption = False,
    columns: ColumnsOption = None,
    heights: HeightsOption = None,
    ocr_sample: OcrSampleOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Report all malformed records and all missing or broken images, and the resolution that their text needs.

    The resolution is for the released vision tower of 336 pixels. 'eval diagnose --records' examines another model.
    """
    from llavar_peft.data.check_records import check_records, summarize_faults
    from llavar_peft.data.image_roots import ImageRoots
    from llavar_peft.data.image_views import RELEASED_SIDE, ImageViews
    from llavar_peft.data.record_store import open_filled_records
    from llavar_peft.models.compare_resolutions import compare_resolutions

    opened = open_filled_records([str(path) for path in records], _selection(split, config, streaming, columns))
    roots = ImageRoots([str(path) for path in images or ()])
    report = check_records(opened, roots)
    texts = find_texts(opened, roots, heights, ocr_sample)
    resolutions = compare_resolutions(texts.texts, ImageViews.of_model(RELEASED_SIDE, "pad"), drawn=texts.drawn)
    if as_json:
        found = report.as_dict()
        listed = {name: [with_released_key(one) for one in found[name]] for name in ("faults", "warnings")}
        say_json(found | listed | {"resolutions": None if resolutions is None else resolutions.as_dict()})
    else:
        for fault in summarize_faults(report.faults, len(opened)):
            say(str(fault))
        for warning in report.warnings:
            say(f"warning: {warning}")
        if resolutions is not None or report.clean:  # with faults, that nothing was measured matters least
            print_resolutions(resolutions, texts)
        say(f"{count_of(len(opened), 'record')}, {count_of(len(report), 'fault')}")
    if not report.clean:
        raise typer.Exit(_INVALID_INPUT)


def data_inspect(
    records: Annotated[Path, typer.Argument(help=_RECORD_HELP, metavar="RECORDS")],
    model: Annotated[Path, typer.Option("--model", help="The checkpoint whose processor encodes the records.")],
    images: ImagesOption = None,
    split: SplitOption = None,
    config: ConfigOption = None,
    streaming: StreamingOption = False,
    columns: ColumnsOption = None,
    vision_tower: VisionTowerOption = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Number of records to show. Default: 5, or all records with --json."),
    ] = None,
    max_length: Annotated[
        int, typer.Option("--max-length", min=1, help="Largest number of tokens of a record; the rest is cut off.")
    ] = 2048,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document per record.")] = False,
) -> None:
    """Show the text of records as the model is trained on it, with the supervised parts in green."""
    from rich.console import Console
    from rich.text import Text

    from llavar_peft.data.encode_record import encode_conversation
    from llavar_peft.data.image_roots import ImageRoots
    from llavar_peft.data.record_store import open_filled_records, parse_record
    from llavar_peft.data.supervised_text import decode_supervision
    from llavar_peft.models.build_model import load_processor

    processor = load_processor(str(model), vision_tower=vision_tower)
    roots = ImageRoots([str(path) for path in images]) if images else None
    opened = open_filled_records([str(records)], _selection(split, config, streaming, columns))
    console = Console(highlight=False, soft_wrap=True)
    if not as_json:
        console.print(Text(f"Conversation template: {processor.template}\n", style="dim"))
    count = limit if limit is not None else len(opened) if as_json else _DEFAULT_LIMIT
    for index in range(min(count, len(opened))):
        conversation = parse_record(opened[index], opened.where(index))
        example = encode_conversation(conversation, processor, max_length, roots=roots)
        spans = decode_supervision(example, processor)
        if as_json:
            say_json(_example_as_dict(example, spans))
        else:
            console.print(_example_as_text(example, spans))


def data_convert(
    source: Annotated[Path, typer.Argument(help=_RECORD_HELP, metavar="SOURCE")],
    out: Annotated[Path, typer.Option("--out", help="The file to write, .json or .jsonl.")],
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Folder for images that SOURCE contains. Default: OUT's name with _images."),
    ] = None,
    split: SplitOption = None,
    config: ConfigOption = None,
    streaming: StreamingOption = False,
    columns: ColumnsOption = None,
    group_by_image: Annotated[
        bool, typer.Option("--group-by-image", help="Make the records about an image turns of one record.")
    ] = False,
    skip_faulty: Annotated[bool, typer.Option("--skip-faulty", help="Leave faulty records out.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, and a folder of images that this command wrote.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write records of any accepted form in the released format, with the images that they contain as files.

    Paths of images stay as they are. The file and the folder appear when everything is written.
    """
    from llavar_peft.data.convert_records import convert_records
    from llavar_peft.data.record_store import open_filled_records

    opened = open_filled_records([str(source)], _selection(split, config, streaming, columns))
    with show_count("converting") as progress:
        done = convert_records(
            opened, out, images, group_by_image=group_by_image, skip_faulty=skip_faulty, overwrite=overwrite,
            progress=progress,
        )  # fmt: skip
    if as_json:
        say_json({**asdict(done), "out": str(out), "images": None if done.images is None else str(done.images)})
        return
    say(f"records   {out}: {count_of(done.records, 'record')}")
    if done.images is not None:
        say(f"images    {done.images}: {count_of(done.files, 'file')}")
    for number, what in (
        (done.grouped, "became turns of another record"),
        (done.messages, "written as 'messages', which the released format cannot express"),
        (done.left_out, "left out"),
    ):
        if number:
            say(f"          {count_of(number, 'record')} {what}")


def _selection(split: str | None, config: str | None, streaming: bool, columns: list[str] | None) -> TableSelection:
    from llavar_peft.data.hub_sources import TableSelection
    from llavar_peft.data.renamed_columns import read_columns

    named = dict(pair.partition("=")[::2] for pair in columns or ())
    return TableSelection(split, config, streaming, read_columns(named, "--columns"))


def _example_as_dict(example: Example, spans: list[tuple[str, bool]]) -> dict[str, Any]:
    return {
        "id": example.id,
        "images": list(map(str, example.images)),
        "dropped": example.dropped,
        "supervised": example.supervised,
        "input_ids": example.input_ids.tolist(),
        "labels": example.labels.tolist(),
        "spans": [{"text": text, "supervised": supervised} for text, supervised in spans],
    }


def _example_as_text(example: Example, spans: list[tuple[str, bool]]) -> Text:
    from rich.text import Text

    count = f"{len(example.input_ids)} tokens, {example.supervised} supervised"
    dropped = f", dropped: {example.dropped}" if example.dropped else ""
    text = Text(f"{make_safe(example.id)} ({count}{dropped})\n", style="bold")
    for span, supervised in spans:
        text.append(make_safe(span), style="not bold green" if supervised else "not bold dim")
    return text.append("\n")
