"""``llavar-peft data``: records and images, looked at before they cost GPU time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from llavar_peft.cli.output import say, say_json

if TYPE_CHECKING:
    from llavar_peft.types import Example

_SHOWN = 5
_FAULTS_FOUND = 2  # the exit status of faulty input, as for every other command


def check(
    records: Annotated[list[Path], typer.Argument(help="Files in the released format.", metavar="RECORDS...")],
    images: Annotated[
        list[Path] | None, typer.Option("--images", help="A folder of pictures; several are searched in order.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")] = False,
) -> None:
    """Find malformed records and missing or broken images: all of them, each with its place."""
    from llavar_peft.data.check_records import check_records
    from llavar_peft.data.image_preparation import ImageRoots
    from llavar_peft.data.record_store import open_records

    opened = open_records([str(path) for path in records])
    report = check_records(opened, ImageRoots([str(path) for path in images or ()]))
    if as_json:
        say_json(report.as_dict())
    else:
        for fault in report.faults:
            say(str(fault))
        for warning in report.warnings:
            say(f"warning: {warning}")
        say(f"{len(opened)} records, {len(report)} fault{'' if len(report) == 1 else 's'}")
    if not report.clean:
        raise typer.Exit(_FAULTS_FOUND)


def inspect(
    records: Annotated[Path, typer.Argument(help="A file in the released format.", metavar="RECORDS")],
    model: Annotated[Path, typer.Option("--model", help="The checkpoint whose processor encodes the records.")],
    images: Annotated[
        list[Path] | None, typer.Option("--images", help="A folder of pictures; image mode 'keep' measures them.")
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option("--vision-tower", help="CLIP's folder, for a model in the released layout.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Records at most; default: 5, and all of them with --json.")
    ] = None,
    max_length: Annotated[int, typer.Option("--max-length", min=1, help="Tokens per record.")] = 2048,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document per record instead of text.")] = False,
) -> None:
    """Show what the model will be trained on: the text that carries loss is green."""
    from llavar_peft.data.encode_record import encode_record
    from llavar_peft.data.image_preparation import ImageRoots
    from llavar_peft.data.record_store import open_records
    from llavar_peft.data.supervised_text import decode_supervision
    from llavar_peft.models.build_model import load_processor

    processor = load_processor(str(model), vision_tower=vision_tower)
    roots = ImageRoots([str(path) for path in images]) if images else None
    opened = open_records([str(records)])
    console = Console(highlight=False, soft_wrap=True)
    shown = limit if limit is not None else len(opened) if as_json else _SHOWN
    for index in range(min(shown, len(opened))):
        example = encode_record(opened[index], processor, max_length, roots=roots)
        spans = decode_supervision(example, processor)
        if as_json:
            say_json(_as_plain(example, spans))
        else:
            console.print(_as_text(example, spans))


def _as_plain(example: Example, spans: list[tuple[str, bool]]) -> dict[str, Any]:
    return {
        "id": example.id,
        "images": list(example.images),
        "dropped": example.dropped,
        "supervised": example.supervised,
        "input_ids": example.input_ids.tolist(),
        "labels": example.labels.tolist(),
        "spans": [{"text": text, "supervised": supervised} for text, supervised in spans],
    }


def _as_text(example: Example, spans: list[tuple[str, bool]]) -> Text:
    count = f"{len(example.input_ids)} tokens, {example.supervised} supervised"
    fate = f", dropped: {example.dropped}" if example.dropped else ""
    text = Text(f"{example.id} ({count}{fate})\n", style="bold")
    for span, supervised in spans:
        text.append(span, style="not bold green" if supervised else "not bold dim")
    return text.append("\n")
