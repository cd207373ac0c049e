"""``llavar-peft eval compare`` and ``diagnose``: better than before? And what is not read?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llavar_peft.cli.eval_command import AsJson, Images, Tower
from llavar_peft.cli.output import say, say_json, show_count
from llavar_peft.cli.tables import interval, print_table
from llavar_peft.errors import ConfigError

if TYPE_CHECKING:
    from llavar_peft.evaluation.vqa.compare_results import Comparison, Difference
    from llavar_peft.evaluation.vqa.diagnose_results import TooSmall
    from llavar_peft.evaluation.vqa.length_report import LengthReport
    from llavar_peft.evaluation.vqa.scored_results import Results

Metric = Annotated[
    str | None, typer.Option("--metric", help="A protocol by the name that the results have; default: their first.")
]


def compare(
    before: Annotated[Path, typer.Argument(help="A results file of 'eval vqa'.", metavar="A")],
    after: Annotated[Path, typer.Argument(help="Another, of the same questions.", metavar="B")],
    metric: Metric = None,
    shown: Annotated[int, typer.Option("--changes", min=0, help="Changed answers to show.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Compare two results question by question: how far apart, how surely, and which answers changed."""
    from llavar_peft.evaluation.vqa.compare_results import compare_results
    from llavar_peft.evaluation.vqa.scored_results import read_results

    first, second = read_results(before), read_results(after)
    comparison = compare_results(first, second, _scored_by(first, metric))
    if as_json:
        say_json(comparison.as_dict())
    else:
        _show_comparison(comparison, shown)


def diagnose(
    results: Annotated[
        Path | None, typer.Argument(help="A results file of 'eval vqa'; or give --records.", metavar="[RESULTS]")
    ] = None,
    metric: Metric = None,
    smallest: Annotated[
        float, typer.Option("--smallest", min=0.0, help="Pixels of the tower from which letters can be read.")
    ] = 7.0,
    records: Annotated[
        list[Path] | None, typer.Option("--records", help="Records instead, before a model is trained on them.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="With --records: the checkpoint whose processor counts tokens.")
    ] = None,
    vision_tower: Tower = None,
    images: Images = None,
    max_length: Annotated[int, typer.Option("--max-length", min=1, help="With --records: tokens per record.")] = 2048,
    as_json: AsJson = False,
) -> None:
    """Show what a model reads and what not, by the letters' height, length, script, place and kind of text.

    Of records: how many are cut at --max-length, and how many hold text too small to be read.
    """
    if (results is None) == (not records):
        raise ConfigError.at("eval diagnose", "needs RESULTS, or --records", "give one of them")
    if results is not None:
        _diagnose_results(results, metric, smallest, as_json=as_json)
        return
    if model is None:
        raise ConfigError.at("--records", "are counted in a model's tokens", "give the model as --model")
    from llavar_peft.data.image_preparation import ImageRoots
    from llavar_peft.data.record_store import open_records
    from llavar_peft.evaluation.vqa.length_report import report_lengths
    from llavar_peft.models.build_model import load_processor

    processor = load_processor(str(model), vision_tower=vision_tower)
    opened, roots = open_records([str(path) for path in records or ()]), ImageRoots(images) if images else None
    with show_count("looking") as progress:
        outlook = report_lengths(opened, processor, max_length, roots, smallest, progress)
    if as_json:
        say_json(outlook.as_dict())
    else:
        _show_outlook(outlook)


def _diagnose_results(results: Path, metric: str | None, smallest: float, *, as_json: bool) -> None:
    from llavar_peft.evaluation.vqa.diagnose_results import break_down, count_too_small
    from llavar_peft.evaluation.vqa.scored_results import read_results

    read = read_results(results)
    protocol = _scored_by(read, metric)
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
    rows = [(group.by, group.name, group.records, f"{group.value:.2f}", interval(group)) for group in groups]
    print_table(("by", "kind", "records", f"{protocol} %", "95 % interval"), rows, words=2)
    _show_too_small(small, "data set")
    for key, value in asdict(read.setting).items():
        if value is not None:
            say(f"{key.replace('_', ' ')}: {value}")


def _show_outlook(outlook: LengthReport) -> None:
    rows = [
        (name, part.records, part.cut, _share(part.cut, part.records), part.lost, *part.percentiles.values())
        for name, part in (("all", outlook.every), ("OCR", outlook.ocr))
        if part.records
    ]
    shares = [f"{share} %" for share in outlook.every.percentiles]
    print_table(("records", "looked at", "cut", "share", "nothing left", *(f"tokens, {one}" for one in shares)), rows)
    say(f"cut: longer than {outlook.max_length} tokens; {outlook.every.records} of {outlook.total} records looked at")
    if outlook.heights:
        heights = ", ".join(f"{share} % up to {height:g}" for share, height in outlook.heights.items())
        say(f"letters' height in pixels of the tower: {heights}")
    _show_too_small(outlook.too_small, "file of records")


def _show_too_small(small: TooSmall, source: str) -> None:
    if small.known:
        say(
            f"too small to be read (below {small.smallest:g} px of the tower): {small.records} of {small.known} "
            f"records whose letters' height is known, {_share(small.records, small.known)}"
        )
    else:
        say(f"the letters' height is not known: the {source} gives neither text_height nor box, or no picture's size")
        if source == "data set":
            say("to take it from an OCR pass: ocr build IMAGES --out read.json, then eval vqa --heights read.json")


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _scored_by(results: Results, metric: str | None) -> str:
    have = list(results.records[0].scores)
    if metric is not None and metric not in have:
        raise ConfigError.at("--metric", f"the results have no {metric!r}", f"use one of {', '.join(have)}")
    return metric or have[0]


def _show_comparison(comparison: Comparison, shown: int) -> None:
    titles = ("by", "kind", "records", "A %", "B %", "B - A", "95 % interval", "gained", "lost", "p (sign test)")
    print_table(titles, [_difference_row(one) for one in (comparison.whole, *comparison.groups)], words=2)
    for key, value in asdict(comparison.first).items():
        if key in comparison.settings:
            one, other = comparison.settings[key]
            say(f"{key.replace('_', ' ')}: {one} in A, {other} in B")
        elif value is not None:
            say(f"{key.replace('_', ' ')}: {value} in both")
    if comparison.unpaired:
        say(f"{comparison.unpaired} records are in one of them only, and left out")
    for change in comparison.changes[:shown]:
        say(f"{'gained' if change.gained else 'lost  '} {change.id}: {change.question}")
        say(f"       truth {' | '.join(change.truths)}\n       A     {change.before}\n       B     {change.after}")
    if len(comparison.changes) > shown:
        say(f"and {len(comparison.changes) - shown} more (--changes, or --json for all)")


def _difference_row(one: Difference) -> tuple[object, ...]:
    return (
        one.by, one.name, one.records, f"{one.before:.2f}", f"{one.after:.2f}", f"{one.difference:+.2f}", interval(one),
        one.gained, one.lost, f"{one.p_value:.2g}",
    )  # fmt: skip
