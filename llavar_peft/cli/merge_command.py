"""``llavar-peft merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llavar_peft.cli.delta_command import ShardGigabytes
from llavar_peft.cli.output import say, show_progress

MergedDtype = Literal["float16", "bfloat16", "float32"]


def merge(
    base: Annotated[Path, typer.Option("--base", help="Folder of what the adapter was trained on.")],
    adapter: Annotated[list[Path], typer.Option("--adapter", help="An adapter's folder; may be given again.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to make; must not exist.")],
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", help="A factor for each adapter; without, each is merged into the result before it."),
    ] = None,
    onto: Annotated[
        Literal["original", "dequantized"] | None,
        typer.Option("--onto", help="For an adapter trained in 4 or 8 bits; default: what it was trained on."),
    ] = None,
    dtype: Annotated[MergedDtype | None, typer.Option("--dtype", help="Of the result; default: the base's.")] = None,
    vision_tower: Annotated[
        Path | None, typer.Option("--vision-tower", help="CLIP's folder, for a plain LLaMA; default: as in training.")
    ] = None,
    projector: Annotated[
        Path | None, typer.Option("--projector", help="Stage 1's file, where the run began with one and it has moved.")
    ] = None,
    as_bin: Annotated[
        bool, typer.Option("--bin", help="Write pytorch_model-*.bin, as LLaVAR was released, instead of safetensors.")
    ] = False,
    shard_gb: ShardGigabytes = 5.0,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Compare the logits before and after; reads everything again.")
    ] = True,
    bound: Annotated[
        float | None, typer.Option("--bound", help="How far apart they may be, relative to their spread.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Even if an adapter was trained on another base.")] = False,
) -> None:
    """Merge adapters into their base, from disk to disk."""
    from llavar_peft.models.merge_adapter import merge_adapter

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
        what = f"merged ({report.onto} base)" if name == "result" else "it would have been, on the original base,"
        say(
            f"logits: {what} {gap.relative:.1e} of their spread apart from the adapter's, {gap.largest:.1e} at most; "
            f"the same likeliest token at {gap.same_top:.0%} of {gap.tokens} positions"
        )
