"""``llavar-peft merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llavar_peft.cli.output import say, show_progress
from llavar_peft.cli.push_command import (
    BaseNameOption,
    PrivateOption,
    PushOption,
    check_push_option,
    push_result,
)
from llavar_peft.cli.shared_options import (
    DtypeOption,
    OntoOption,
    OutFolderOption,
    ShardGigabytes,
    TrainedProjectorOption,
    TrainedTowerOption,
)


def merge(
    base: Annotated[Path, typer.Option("--base", help="The folder of the model that the adapter was trained on.")],
    adapter: Annotated[
        list[Path], typer.Option("--adapter", help="The folder of an adapter. Repeat the option for several.")
    ],
    out: OutFolderOption,
    weight: Annotated[
        list[float] | None,
        typer.Option(
            "--weight",
            help="A factor for each adapter, in order; their weighted sum is merged. Without factors, each adapter is "
            "merged into the result of the one before.",
        ),
    ] = None,
    onto: OntoOption = None,
    dtype: DtypeOption = None,
    vision_tower: TrainedTowerOption = None,
    projector: TrainedProjectorOption = None,
    as_bin: Annotated[
        bool, typer.Option("--bin", help="Write pytorch_model-*.bin, as LLaVAR was released, instead of safetensors.")
    ] = False,
    shard_gb: ShardGigabytes = 5.0,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe/--no-probe", help="Compare the logits before and after the merge, while the weights are written."
        ),
    ] = True,
    bound: Annotated[
        float | None,
        typer.Option(
            "--bound",
            help="Largest accepted difference of the logits, relative to their spread. Default: 0.05, or 0.5 for "
            "--onto original.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Merge even if an adapter was trained on another base.")
    ] = False,
    push: PushOption = None,
    private: PrivateOption = False,
    base_name: BaseNameOption = None,
) -> None:
    """Merge adapters into their base, from disk to disk."""
    from llavar_peft.models.merge_adapter import merge_adapter

    check_push_option(push, private, base_name, [str(base)])

    with show_progress("merging") as progress:
        report = merge_adapter(
            base,
            adapter,
            out,
            weights=weight or None,
            onto=onto,
            dtype=dtype,
            vision_tower=vision_tower,
            projector=projector,
            form="bin" if as_bin else "safetensors",
            shard_size=round(shard_gb * 1e9),
            probe=probe,
            bound=bound,
            force=force,
            progress=progress,
        )
    say(f"{report.out}: {report.tensors} tensors, {report.nbytes / 1e9:.2f} GB in {report.seconds:.0f} s")
    for name, gap in report.gaps.items():
        which = f"the result ({report.onto} base)" if name == "result" else "a merge onto the original base"
        say(
            f"logits of {which}: differ from the adapter's by {gap.relative:.1e} of their spread, "
            f"{gap.largest:.1e} at most; same top token at {gap.same_top:.0%} of {gap.tokens} positions"
        )
    push_result(report.out, push, private, base_name)
