"""``llavar-peft report``: what a run learnt, what it scores and what it reads, on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llavar_peft.cli.output import say


def report(
    run: Annotated[
        Path | None, typer.Argument(help="A run's folder; results in it (*.results.json) are found.", metavar="[RUN]")
    ] = None,
    results: Annotated[
        list[Path] | None, typer.Option("--results", help="A results file of 'eval vqa' or 'mme'; several are fine.")
    ] = None,
    reviews: Annotated[
        list[Path] | None,
        typer.Option("--reviews", help="A file that 'eval judge' wrote; *.reviews.jsonl in a run's folder are found."),
    ] = None,
    before: Annotated[
        list[Path] | None,
        typer.Option("--before", help="What to compare with: results of the same questions, or another run's folder."),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option("--images", help="A folder of the results' pictures; default: those of the run's recipe."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="The protocol that tells best from worst; default: the first.")
    ] = None,
    images_per_row: Annotated[
        int, typer.Option("--pictures", min=0, help="In each row; fewer where the page would be more than 3 MB.")
    ] = 6,
    title: Annotated[str | None, typer.Option("--title", help="Of the page; default: the run's name.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The page; default: report.html in the run's folder.")
    ] = None,
) -> None:
    """Write a run's report: one HTML file that needs nothing else, for runs, for results, or for both."""
    from llavar_peft.evaluation.report.write_report import ReportSettings, write_report

    settings = ReportSettings(
        results=results or (),
        reviews=reviews or (),
        before=before or (),
        images=images or (),
        metric=metric,
        images_per_row=images_per_row,
        title=title,
    )
    say(str(write_report(run, out, settings)))
