"""``llavar-peft adapter``: what an adapter on disk is, and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llavar_peft.cli.output import say, say_json

if TYPE_CHECKING:
    from rich.table import Table

    from llavar_peft.weights.adapter.adapter_report import AdapterReport

Folder = Annotated[Path, typer.Argument(help="An adapter's folder.", metavar="DIR")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]


def show(folder: Folder, as_json: AsJson = False) -> None:
    """Say what an adapter is: kind, size, base, and how large its updates are."""
    from llavar_peft.weights.adapter.adapter_report import describe_adapter

    report = describe_adapter(folder)
    if as_json:
        say_json(report.as_dict())
        return
    from rich.console import Console

    console = Console(highlight=False)
    for what, value in _lines(report):
        console.print(f"{what:<13} {value}", markup=False, soft_wrap=True)
    console.print(_table(report))


def verify(
    folder: Folder,
    base: Annotated[
        Path | None, typer.Option("--base", help="What it should fit: a checkpoint, or the language model it grew on.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that an adapter is undamaged, makes sense, and belongs to its base."""
    from llavar_peft.weights.adapter.adapter_report import verify_adapter

    check = verify_adapter(folder, base=base)
    if as_json:
        say_json(
            {"tensors": check.tensors, "elements": check.elements, "checksums": check.checksums, "base": check.base}
        )
        return
    sums = "as their checksums say" if check.checksums else "without checksums to hold them against"
    say(f"{check.tensors} tensors, {check.elements:,} numbers, all finite, {sums}")
    say(
        f"the base is right, told by its {check.base}; each tensor lands on it"
        if check.base
        else "the base was not looked at: name it with --base"
    )


def _lines(report: AdapterReport) -> list[tuple[str, str]]:
    sources = [
        str(report.base[key]) for key in ("checkpoint", "language_model", "vision_tower") if report.base.get(key)
    ]
    rows = [f"{module} {', '.join(map(str, indices))}" for module, indices in report.rows.items()]
    return [
        ("variant", f"{report.variant}, rank {report.rank}, alpha {report.alpha:g}{', with biases' * report.bias}"),
        ("target", report.target),
        ("in full", ", ".join(report.in_full) or "nothing"),
        ("rows", "; ".join(rows) or "none"),
        ("holds", f"{report.tensors} tensors, {report.parameters:,} numbers in {', '.join(report.dtypes)}"),
        ("size", f"{report.nbytes / 1e6:.1f} MB"),
        ("base", f"{' + '.join(str(source) for source in sources if source) or 'not said'}{_stored(report)}"),
        ("fingerprint", report.fingerprint or "none: another base cannot be told"),
    ]


def _stored(report: AdapterReport) -> str:
    return f", stored as {report.base['quantize']}" if report.base.get("quantize") else ""


def _table(report: AdapterReport) -> Table:
    from rich.table import Table

    table = Table("layer", "trained", "number", "parameters", "norm", "largest")
    for column in table.columns[2:]:
        column.justify = "right"
    for kind in report.kinds:
        numbers = (str(kind.modules), f"{kind.parameters:,}", f"{kind.norm:.4g}", f"{kind.largest:.4g}")
        table.add_row(kind.name, kind.how, *numbers)
    return table
