"""``llavar-peft report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llavar_peft.cli.output import say


def report(
    run: Annotated[
        Path | None,
        typer.Argument(
            help="The folder of a run. Its *.results.json, *.reviews.jsonl and *.heights.json are included.",
            metavar="[RUN]",
        ),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            "--results",
            help="A results file of 'eval vqa', 'eval mme' or 'eval fields'. Repeat the option for several.",
        ),
    ] = None,
    reviews: Annotated[
        list[Path] | None,
        typer.Option("--reviews", help="A reviews file of 'eval judge'. Repeat the option for several."),
    ] = None,
    heights: Annotated[
        list[Path] | None,
        typer.Option("--heights", help="A file of 'eval heights'. Repeat the option for several."),
    ] = None,
    before: Annotated[
        list[Path] | None,
        typer.Option(
            "--before", help="What to compare with: results for the same questions, or the folder of another run."
        ),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option("--images", help="A folder of the results' images. Default: the folders in the run's recipe."),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option("--metric", help="The protocol that selects the best and worst answers. Default: the first."),
    ] = None,
    images_per_row: Annotated[
        int,
        typer.Option("--pictures", min=0, help="Number of images in a row. It is reduced to keep the page below 3 MB."),
    ] = 6,
    title: Annotated[str | None, typer.Option("--title", help="The page's title. Default: the run's name.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file to write. Default: report.html in the run's folder.")
    ] = None,
) -> None:
    """Write a report of a run, of results, or of both, as one self-contained HTML file."""
    from llavar_peft.evaluation.report.write_report import ReportSettings, write_report

    settings = ReportSettings(
        results=results or (),
        reviews=reviews or (),
        heights=heights or (),
        before=before or (),
        images=images or (),
        metric=metric,
        images_per_row=images_per_row,
        title=title,
    )
    say(str(write_report(run, out, settings)))
