"""``llavar-peft delta``: the released format, made, applied and verified from disk to disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llavar_peft.cli.output import say, show_progress

if TYPE_CHECKING:
    from llavar_peft.weights.io.folder_writer import WeightsReport
    from llavar_peft.weights.io.shard_layout import WeightsFormat

Base = Annotated[Path, typer.Option("--base", help="Folder of the LLaMA or Vicuna that the delta is taken from.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to make; must not exist.")]
Safetensors = Annotated[
    bool, typer.Option("--safetensors", help="Write safetensors instead of pytorch_model-*.bin as released.")
]
ShardGigabytes = Annotated[
    float, typer.Option("--shard-gb", min=0.001, help="Gigabytes (10^9 bytes) of a file at most.")
]


def make(
    base: Base,
    target: Annotated[Path, typer.Option("--target", help="Folder of the LLaVAR: ours, or in the released layout.")],
    out: Out,
    adapter: Annotated[
        list[Path] | None, typer.Option("--adapter", help="Merged into the target on the way; may be given again.")
    ] = None,
    onto: Annotated[
        Literal["original", "dequantized"] | None,
        typer.Option("--onto", help="For an adapter trained in 4 or 8 bits; default: what it was trained on."),
    ] = None,
    safetensors: Safetensors = False,
    shard_gb: ShardGigabytes = 10.0,
) -> None:
    """Write target - base, as LLaVAR was released."""
    from llavar_peft.weights.delta.delta_files import make_delta

    with show_progress("delta") as progress:
        report = make_delta(
            base,
            target,
            out,
            adapter=adapter or (),
            onto=onto,
            form=weights_format(safetensors),
            shard_size=round(shard_gb * 1e9),
            progress=progress,
        )
    say_report(report)


def apply(
    base: Base,
    delta: Annotated[Path, typer.Option("--delta", help="Folder of the delta, as released or made here.")],
    out: Out,
    safetensors: Safetensors = False,
    shard_gb: ShardGigabytes = 10.0,
    force: Annotated[bool, typer.Option("--force", help="Even if the delta was taken from another base.")] = False,
) -> None:
    """Write base + delta: from LLaMA-13B and the released delta to LLaVAR."""
    from llavar_peft.weights.delta.delta_files import apply_delta

    with show_progress("weights") as progress:
        report = apply_delta(
            base,
            delta,
            out,
            form=weights_format(safetensors),
            shard_size=round(shard_gb * 1e9),
            force=force,
            progress=progress,
        )
    say_report(report)


def verify(
    base: Base,
    delta: Annotated[Path, typer.Option("--delta", help="Folder of the delta.")],
    target: Annotated[
        Path | None, typer.Option("--target", help="Folder that base + delta should give; compared number by number.")
    ] = None,
) -> None:
    """Check that a delta is undamaged, that it was taken from this base, and what it gives."""
    from llavar_peft.weights.delta.verify_delta import verify_delta

    with show_progress("reading") as progress:
        check = verify_delta(base, delta, target=target, progress=progress)
    say(f"{check.tensors} tensors, {check.elements:,} numbers, all finite; the base is right, told by {check.base}")
    if check.compared:
        share = check.differing / max(1, check.elements)
        say(
            f"{check.differing:,} numbers ({share:.2%}) of the target come back rounded, by {check.largest:.1e} at most"
        )


def weights_format(safetensors: bool) -> WeightsFormat:
    """The format that the option stands for."""
    return "safetensors" if safetensors else "bin"


def say_report(report: WeightsReport) -> None:
    """Print what was written."""
    say(f"{report.out}: {report.tensors} tensors, {report.nbytes / 1e9:.2f} GB in {report.seconds:.0f} s")
