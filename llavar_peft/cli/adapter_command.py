"""``llavar-peft adapter``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llavar_peft.cli.output import print_table, say, say_json, show_progress
from llavar_peft.cli.shared_options import (
    DtypeOption,
    JsonOption,
    OutFolderOption,
    ShardGigabytes,
    TrainedProjectorOption,
    TrainedTowerOption,
)

if TYPE_CHECKING:
    from llavar_peft.weights.adapter.adapter_report import AdapterReport
    from llavar_peft.weights.adapter.vllm_rules import VllmCheck

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
    engine: Annotated[
        Literal["vllm"] | None,
        typer.Option("--for", help="The engine that is to load the adapter: say everything that keeps it from that."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that an adapter is undamaged and finite and, with --base, that it fits its base."""
    from llavar_peft.weights.adapter.adapter_report import verify_adapter
    from llavar_peft.weights.adapter.vllm_rules import check_for_vllm

    served = check_for_vllm(folder) if engine is not None else None
    if served is not None and served.faults:
        _raise_rejected(folder, served, base)
    check = verify_adapter(folder, base=base)
    if as_json:
        found = {"tensors": check.tensors, "elements": check.elements, "checksums": check.checksums, "base": check.base}
        say_json(found if served is None else {**found, "vllm": {"max_lora_rank": served.max_lora_rank}})
        return
    checksums = "checksums match" if check.checksums else "no checksums to compare with"
    say(f"{check.tensors} tensors, {check.elements:,} numbers, all finite; {checksums}")
    say(
        f"the base matches by its {check.base}, and every tensor fits it"
        if check.base
        else "the base was not checked; name it with --base"
    )
    if served is not None:
        options = f"--enable-lora --max-lora-rank {served.max_lora_rank} --lora-modules {shlex.quote(f'NAME={folder}')}"
        say(f"vLLM loads it with the exported base: vllm serve EXPORTED {options}")
        if served.quantize is not None:
            say(f"it was trained on a base in {served.quantize}; on one in 16 bits its answers can differ")


def adapter_bake(
    folder: AdapterFolder,
    base: Annotated[Path, typer.Option("--base", help="The folder of the model that the adapter was trained on.")],
    out: OutFolderOption,
    dtype: DtypeOption = None,
    vision_tower: TrainedTowerOption = None,
    projector: TrainedProjectorOption = None,
    shard_gb: ShardGigabytes = 5.0,
    probe: Annotated[
        bool,
        typer.Option("--probe/--no-probe", help="Compare the logits before and after. This reads all weights again."),
    ] = True,
    bound: Annotated[
        float | None,
        typer.Option("--bound", help="Largest accepted difference of the logits, relative to their spread (0.05)."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Accept a base that the adapter was not trained on.")] = False,
) -> None:
    """Put an adapter's projector, rows and updates of the tower into a copy of its base, and leave a pure LoRA."""
    from llavar_peft.models.bake_adapter import bake_adapter

    with show_progress("baking") as progress:
        report = bake_adapter(
            base,
            folder,
            out,
            dtype=dtype,
            vision_tower=vision_tower,
            projector=projector,
            shard_size=round(shard_gb * 1e9),
            probe=probe,
            bound=bound,
            force=force,
            progress=progress,
        )
    say(
        f"{report.out}: the base, {report.tensors} tensors, {report.nbytes / 1e9:.2f} GB in {report.seconds:.0f} s; "
        f"the adapter changed {len(report.baked)} of them"
    )
    say(f"{report.adapter}: the LoRA, {report.updates} low-rank updates")
    if report.gap is not None:
        say(
            f"logits of base and LoRA: differ from the adapter's by {report.gap.relative:.1e} of their spread, "
            f"{report.gap.largest:.1e} at most; same top token at {report.gap.same_top:.0%} of "
            f"{report.gap.tokens} positions"
        )


def _raise_rejected(folder: Path, served: VllmCheck, base: Path | None) -> None:
    """Raise an error with every reason why vLLM does not apply an adapter, and with all damage."""
    from llavar_peft.errors import LlavarError, WeightsError
    from llavar_peft.weights.adapter.adapter_report import verify_adapter

    faults = list(served.faults)
    try:
        verify_adapter(folder, base=base)
    except LlavarError as error:
        faults += error.faults
    raise WeightsError.listing(f"vLLM does not load {folder} as it was trained", faults)


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
