"""``llavar-peft adapter``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llavar_peft.cli.output import print_table, say, say_json
from llavar_peft.cli.shared_options import JsonOption

if TYPE_CHECKING:
    from llavar_peft.weights.adapter.adapter_report import AdapterReport

AdapterFolder = Annotated[Path, typer.Argument(help="The folder of the adapter.", metavar="DIR")]


def adapter_show(folder: AdapterFolder, as_json: JsonOption = False) -> None:
    """Show an adapter's kind, size and base, and the size of its updates by layer."""
    from llavar_peft.weights.adapter.adapter_report import describe_adapter

    report = describe_adapter(folder)
    if as_json:
        say_json(report.as_dict())
        return
    for name, value in _lines(report):
        say(f"{name:<13} {value}")
    rows = [
        (kind.name, kind.how, kind.modules, f"{kind.parameters:,}", f"{kind.norm:.4g}", f"{kind.largest:.4g}")
        for kind in report.kinds
    ]
    print_table(("layer", "trained", "number", "parameters", "norm", "largest"), rows, text_columns=2)


def adapter_verify(
    folder: AdapterFolder,
    base: Annotated[
        Path | None,
        typer.Option("--base", help="The checkpoint or language model that the adapter was trained on, to check too."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that an adapter is undamaged and finite and, with --base, that it fits its base."""
    from llavar_peft.weights.adapter.adapter_report import verify_adapter

    check = verify_adapter(folder, base=base)
    if as_json:
        say_json(
            {"tensors": check.tensors, "elements": check.elements, "checksums": check.checksums, "base": check.base}
        )
        return
    checksums = "checksums match" if check.checksums else "no checksums to compare with"
    say(f"{check.tensors} tensors, {check.elements:,} numbers, all finite; {checksums}")
    say(
        f"the base matches by its {check.base}, and every tensor fits it"
        if check.base
        else "the base was not checked; name it with --base"
    )


def _lines(report: AdapterReport) -> list[tuple[str, str]]:
    from llavar_peft.weights.io.stated_resolution import resolution_of_adapter

    sources = [
        str(report.base[key]) for key in ("checkpoint", "language_model", "vision_tower") if report.base.get(key)
    ]
    rows = [f"{module} {', '.join(map(str, indices))}" for module, indices in report.rows.items()]
    tower = f", of the vision tower {report.tower_rank}" if report.tower_rank is not None else ""
    stored = f", stored as {report.base['quantize']}" if report.base.get("quantize") else ""
    resolution = str((resolution_of_adapter(Path(report.folder)) or {}).get("type", ""))
    stored += f", with {resolution.replace('_', '-')}" if resolution else ""
    lines = [
        (
            "variant",
            f"{report.variant}, rank {report.rank}{tower}, alpha {report.alpha:g}{', with biases' * report.bias}",
        ),
        ("target", report.target),
        ("in full", ", ".join(report.in_full) or "nothing"),
        ("rows", "; ".join(rows) or "none"),
        ("holds", f"{report.tensors} tensors, {report.parameters:,} numbers in {', '.join(report.dtypes)}"),
        ("size", f"{report.nbytes / 1e6:.1f} MB"),
        ("base", f"{' + '.join(sources) or 'unknown'}{stored}"),
        ("fingerprint", report.fingerprint or "none; a wrong base cannot be detected"),
    ]
    return [*lines, *([("tower", report.tower_fingerprint)] if report.tower_fingerprint is not None else [])]
