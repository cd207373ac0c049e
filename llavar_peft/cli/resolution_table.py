"""How ``data check`` and ``eval diagnose`` find the heights of letters, and show what each resolution makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from llavar_peft.cli.output import print_table, say, show_count
from llavar_peft.errors import count_of

if TYPE_CHECKING:
    from llavar_peft.data.image_roots import ImageRoots
    from llavar_peft.data.record_store import RecordSource
    from llavar_peft.data.record_texts import TextSample
    from llavar_peft.models.compare_resolutions import ResolutionFigures, ResolutionReport

HeightsOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--heights",
        help="Records of 'ocr build' for the same images. The lines that were read give the heights of the letters, "
        "in place of those that records state.",
    ),
]
OcrSampleOption: TypeAlias = Annotated[
    int,
    typer.Option(
        "--ocr-sample",
        min=0,
        help="Read this many images by OCR to measure their letters, among the records that do not state a height.",
    ),
]
_WAYS = "add text_height, give --heights with records of 'ocr build', or measure some images with --ocr-sample 100"
_PLAIN_LENGTH = 2048  # max_length of a recipe that does not set it


def find_texts(
    records: RecordSource, roots: ImageRoots, heights: Path | None = None, ocr_sample: int = 0
) -> TextSample:
    """Return the heights of the letters in a sample of the records, by the options above.

    Raises:
        DataError: The readings are missing or damaged.
        MissingDependencyError: OCR is requested, and no engine is installed.
    """
    from llavar_peft.data.record_texts import TextSample, sample_texts

    stored = None
    if heights is not None:
        from llavar_peft.datagen.ocr.read_line_heights import open_stored_lines

        stored = open_stored_lines(heights)
    known = sample_texts(records, lambda _: roots, read=stored)
    if not ocr_sample or not known.unknown:
        return known
    from llavar_peft.datagen.ocr.read_line_heights import open_line_reader

    reader = open_line_reader()
    count = min(ocr_sample, len(known.unknown))
    with show_count("reading images") as progress:
        read = sample_texts(
            records,
            lambda _: roots,
            indices=known.unknown,
            count=count,
            read=reader,
            stated=False,
            progress=lambda done: progress(done, count),
        )
    return TextSample((*known.texts, *read.texts), read.unknown, known.drawn)


def print_resolutions(report: ResolutionReport | None, sample: TextSample, max_length: int = _PLAIN_LENGTH) -> None:
    """Print what share of the text is too small at each resolution, and the cheapest one at which it can be read.

    Args:
        report: From the texts of the sample; None if the heights are unknown.
        sample: The sample of records.
        max_length: Tokens of a record in training.
    """
    if report is None:
        if sample.drawn:
            say(f"letter heights: unknown, so no resolution can be recommended; {_WAYS}")
        return
    say(
        f"letter heights in the vision tower's input of {report.side} x {report.side} pixels, of {report.records} of "
        f"{count_of(report.drawn, 'record')} with images:"
    )
    current = [] if report.current is None else [("the model as it is", *_cells(report.current))]
    rows = [*current, *((one.name, *_cells(one)) for one in report.settings)]
    print_table(("model.resolution", "too small", "median px", "image tokens a record", "images for the tower"), rows)
    say(f"too small: below {report.smallest:g} px")
    _print_advice(report, max_length)


def _cells(one: ResolutionFigures) -> tuple[str, ...]:
    return (
        f"{100 * one.share_below:.1f} %", f"{one.median_height:.1f}", f"{one.image_tokens:,.0f}",
        f"{one.tower_images:.1f}",
    )  # fmt: skip


def _print_advice(report: ResolutionReport, max_length: int) -> None:
    if not report.reached:
        say("at no resolution, 95 % of the text can be read; the best is:")
    elif report.recommended[0].resolution is None:
        say(f"no higher resolution is needed: 95 % of the text or more has at least {report.smallest:g} px")
        return
    else:
        say("to read 95 % of the text, put one line under model: in the recipe (the cheapest comes first)")
    for one in report.recommended:
        length = f", max_length of about {one.longest}" if one.longest > max_length else ""
        length += ", new layers to train" if one.name.startswith("cross") else ""
        readable = f"{100 * (1 - one.share_below):.1f} % of the text, {one.image_tokens:,.0f} image tokens a record"
        say(f"  {one.recipe}    # {readable}{length}")
    if not report.reached and report.own_below > 0:
        share = f"{100 * report.own_below:.1f} %"
        say(f"{share} of the text is below {report.smallest:g} px in the images themselves: scan them larger")
