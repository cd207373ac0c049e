"""``llavar-peft delta``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llavar_peft.cli.output import say, say_weights, show_progress
from llavar_peft.cli.push_command import (
    BaseNameOption,
    PrivateOption,
    PushOption,
    check_push_option,
    push_result,
)
from llavar_peft.cli.shared_options import OntoOption, OutFolderOption, ShardGigabytes

if TYPE_CHECKING:
    from llavar_peft.weights.io.shard_layout import WeightsFormat

Base = Annotated[Path, typer.Option("--base", help="The folder of the language model that the delta refers to.")]
Delta = Annotated[Path, typer.Option("--delta", help="The folder of the delta.")]
Safetensors = Annotated[
    bool, typer.Option("--safetensors", help="Write safetensors instead of pytorch_model-*.bin, the released format.")
]


def delta_make(
    base: Base,
    target: Annotated[
        Path, typer.Option("--target", help="The folder of the LLaVAR, in this package's or the released layout.")
    ],
    out: OutFolderOption,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapter", help="The folder of an adapter to merge into the target. Repeat the option for several."
        ),
    ] = None,
    onto: OntoOption = None,
    safetensors: Safetensors = False,
    shard_gb: ShardGigabytes = 10.0,
    push: PushOption = None,
    private: PrivateOption = False,
    base_name: BaseNameOption = None,
) -> None:
    """Write the difference target - base, the format in which LLaVAR was released."""
    from llavar_peft.weights.delta.delta_files import make_delta

    check_push_option(push, private, base_name, [str(base)])
    with show_progress("delta") as progress:
        report = make_delta(
            base,
            target,
            out,
            adapter=adapter or (),
            onto=onto,
            form=_weights_format(safetensors),
            shard_size=round(shard_gb * 1e9),
            progress=progress,
        )
    say_weights(report)
    push_result(report.out, push, private, base_name)


def delta_apply(
    base: Base,
    delta: Delta,
    out: OutFolderOption,
    safetensors: Safetensors = False,
    shard_gb: ShardGigabytes = 10.0,
    force: Annotated[
        bool, typer.Option("--force", help="Apply the delta even if it was made from another base.")
    ] = False,
) -> None:
    """Write the sum base + delta, e.g. LLaVAR from LLaMA-13B and the released delta."""
    from llavar_peft.weights.delta.delta_files import apply_delta

    with show_progress("weights") as progress:
        report = apply_delta(
            base,
            delta,
            out,
            form=_weights_format(safetensors),
            shard_size=round(shard_gb * 1e9),
            force=force,
            progress=progress,
        )
    say_weights(report)


def delta_verify(
    base: Base,
    delta: Delta,
    target: Annotated[
        Path | None,
        typer.Option("--target", help="The folder to compare base + delta with, number by number."),
    ] = None,
) -> None:
    """Check that a delta is undamaged and was made from this base, and what base + delta gives."""
    from llavar_peft.weights.delta.verify_delta import verify_delta

    with show_progress("reading") as progress:
        check = verify_delta(base, delta, target=target, progress=progress)
    say(f"{check.tensors} tensors, {check.elements:,} numbers, all finite; the base matches by its {check.base}")
    if check.compared:
        share = check.differing / max(1, check.elements)
        say(
            f"base + delta differs from the target in {check.differing:,} numbers ({share:.2%}) by rounding, "
            f"{check.largest:.1e} at most"
        )


def _weights_format(safetensors: bool) -> WeightsFormat:
    return "safetensors" if safetensors else "bin"
