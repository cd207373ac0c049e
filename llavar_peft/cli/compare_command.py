"""``llavar-peft eval compare`` and ``eval diagnose``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from llavar_peft.cli.output import format_interval, print_table, say, say_json, show_count
from llavar_peft.cli.resolution_table import HeightsOption, OcrSampleOption, find_texts, print_resolutions
from llavar_peft.cli.shared_options import ImagesOption, JsonOption, VisionTowerOption
from llavar_peft.errors import ConfigError, count_of

if TYPE_CHECKING:
    from llavar_peft.evaluation.vqa.compare_results import Comparison, Difference
    from llavar_peft.evaluation.vqa.diagnose_results import TooSmall
    from llavar_peft.evaluation.vqa.length_report import LengthReport
    from llavar_peft.evaluation.vqa.scored_results import Results

MetricOption: TypeAlias = Annotated[
    str | None, typer.Option("--metric", help="The scoring protocol to use. Default: the first one in the results.")
]


def eval_compare(
    before: Annotated[Path, typer.Argument(help="A results file of 'eval vqa'.", metavar="A")],
    after: Annotated[Path, typer.Argument(help="A results file for the same questions.", metavar="B")],
    metric: MetricOption = None,
    shown: Annotated[int, typer.Option("--changes", min=0, help="Number of changed answers to show.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Compare two results question by question: the difference, its significance, and the changed answers."""
    from llavar_peft.evaluation.vqa.compare_results import compare_results
    from llavar_peft.evaluation.vqa.scored_results import read_results

    first, second = read_results(before), read_results(after)
    comparison = compare_results(first, second, _choose_protocol(first, metric))
    if as_json:
        say_json(comparison.as_dict())
    else:
        _print_comparison(comparison, shown)


def eval_diagnose(
    results: Annotated[
        Path | None,
        typer.Argument(help="A results file of 'eval vqa'. Leave it out with --records.", metavar="[RESULTS]"),
    ] = None,
    metric: MetricOption = None,
    smallest: Annotated[
        float,
        typer.Option(
            "--smallest", min=0.0, help="Smallest height of readable letters, in pixels of the vision tower's input."
        ),
    ] = 7.0,
    records: Annotated[
        list[Path] | None,
        typer.Option("--records", help="A file of training records to examine. Repeat the option for several."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="With --records: the checkpoint whose processor counts the tokens.")
    ] = None,
    vision_tower: VisionTowerOption = None,
    images: ImagesOption = None,
    max_length: Annotated[
        int, typer.Option("--max-length", min=1, help="With --records: largest number of tokens of a record.")
    ] = 2048,
    heights: HeightsOption = None,
    ocr_sample: OcrSampleOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Show which texts a model reads well, by letter height, length, script, position and kind of text.

    With --records, show before training how many records are cut at --max-length, how many contain text that is too
    small to read, and the cheapest model.resolution at which it can be read.
    """
    if (results is None) == (not records):
        raise ConfigError.at("eval diagnose", "it needs either RESULTS or --records", "give one of them")
    if results is not None:
        _diagnose_results(results, metric, smallest, as_json=as_json)
        return
    if model is None:
        raise ConfigError.at("--records", "counting their tokens needs a model's processor", "give --model")
    from llavar_peft.data.image_roots import ImageRoots
    from llavar_peft.data.image_views import ImageViews
    from llavar_peft.data.record_store import open_records
    from llavar_peft.evaluation.vqa.length_report import report_lengths
    from llavar_peft.models.build_model import load_processor
    from llavar_peft.models.compare_resolutions import compare_resolutions
    from llavar_peft.recipe.resolution import resolution_from

    processor = load_processor(str(model), vision_tower=vision_tower)
    opened, roots = open_records([str(path) for path in records or ()]), ImageRoots(images) if images else None
    with show_count("reading") as progress:
        report = report_lengths(opened, processor, max_length, roots, smallest, progress)
    texts = find_texts(opened, roots or ImageRoots(), heights, ocr_sample)
    resolutions = compare_resolutions(
        texts.texts,
        ImageViews.of_model(processor, processor.image_mode),
        own=resolution_from(processor.resolution, str(model)),
        max_length=max_length,
        smallest=smallest,
        drawn=texts.drawn,
    )
    if as_json:
        say_json(report.as_dict() | {"resolutions": None if resolutions is None else resolutions.as_dict()})
    else:
        _print_lengths(report, measured=resolutions is not None)
        print_resolutions(resolutions, texts, max_length)


def _diagnose_results(results: Path, metric: str | None, smallest: float, *, as_json: bool) -> None:
    from llavar_peft.evaluation.vqa.diagnose_results import break_down, count_too_small
    from llavar_peft.evaluation.vqa.scored_results import read_results

    read = read_results(results)
    protocol = _choose_protocol(read, metric)
    groups, small = break_down(read, protocol), count_too_small(read.records, smallest)
    if as_json:
        say_json(
            {
                "protocol": protocol,
                "dataset": read.dataset,
                "setting": asdict(read.setting),
                "groups": [asdict(group) for group in groups],
                "too_small": asdict(small),
            }
        )
        return
    rows = [
        (group.by, group.name, group.records, f"{group.value:.2f}", format_interval(group.low, group.high))
        for group in groups
    ]
    print_table(("by", "kind", "records", f"{protocol} %", "95 % interval"), rows, text_columns=2)
    _print_too_small(small, "data set")
    if small.records:
        say("which model.resolution would help: eval diagnose --records RECORDS --model MODEL, for records like these")
    for key, value in asdict(read.setting).items():
        if value is not None:
            say(f"{key.replace('_', ' ')}: {value}")


def _print_lengths(report: LengthReport, *, measured: bool) -> None:
    rows = [
        (name, part.records, part.cut, _share(part.cut, part.records), part.lost, *part.percentiles.values())
        for name, part in (("all", report.every), ("OCR", report.ocr))
        if part.records
    ]
    shares = [f"{share} %" for share in report.every.percentiles]
    print_table(("records", "examined", "cut", "share", "nothing left", *(f"tokens, {one}" for one in shares)), rows)
    say(f"cut: longer than {report.max_length} tokens; {report.every.records} of {report.total} records examined")
    if report.heights:
        heights = ", ".join(f"{share} % up to {height:g}" for share, height in report.heights.items())
        say(f"letter height in pixels of the vision tower's input: {heights}")
    if report.too_small.known or not measured:
        _print_too_small(report.too_small, "file of records")


def _print_too_small(small: TooSmall, source: str) -> None:
    if small.known:
        say(
            f"too small to read (letters below {small.smallest:g} px in the vision tower's input): "
            f"{small.records} of {small.known} records with known letter height, "
            f"{_share(small.records, small.known)}"
        )
    else:
        say(f"the letter height is unknown: the {source} contains no text_height or box, or no image size")
        if source == "data set":
            say("to measure it by OCR: ocr build IMAGES --out read.json, then eval vqa --heights read.json")


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _choose_protocol(results: Results, metric: str | None) -> str:
    present = list(results.records[0].scores)
    if metric is not None and metric not in present:
        raise ConfigError.at(
            "--metric", f"the results do not contain the protocol {metric!r}", f"use one of {', '.join(present)}"
        )
    return metric or present[0]


def _print_comparison(comparison: Comparison, shown: int) -> None:
    titles = ("by", "kind", "records", "A %", "B %", "B - A", "95 % interval", "gained", "lost", "p (sign test)")
    print_table(titles, [_difference_row(one) for one in (comparison.whole, *comparison.groups)], text_columns=2)
    for key, value in asdict(comparison.first).items():
        if key in comparison.settings:
            one, other = comparison.settings[key]
            say(f"{key.replace('_', ' ')}: {one} in A, {other} in B")
        elif value is not None:
            say(f"{key.replace('_', ' ')}: {value} in both")
    if comparison.unpaired:
        say(f"excluded, because only one of the results has them: {count_of(comparison.unpaired, 'record')}")
    for change in comparison.changes[:shown]:
        say(f"{'gained' if change.gained else 'lost  '} {change.id}: {change.question}")
        say(f"       truth {' | '.join(change.truths)}\n       A     {change.before}\n       B     {change.after}")
    if len(comparison.changes) > shown:
        say(f"and {len(comparison.changes) - shown} more (--changes, or --json for all)")


def _difference_row(one: Difference) -> tuple[object, ...]:
    return (
        one.by, one.name, one.records, f"{one.before:.2f}", f"{one.after:.2f}", f"{one.difference:+.2f}",
        format_interval(one.low, one.high), one.gained, one.lost, f"{one.p_value:.2g}",
    )  # fmt: skip
