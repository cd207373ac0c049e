"""``llavar-peft merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llavar_peft.cli._output import show_progress
from llavar_peft.cli.delta import ShardGigabytes, say_report

MergedDtype = Literal["float16", "bfloat16", "float32"]


def merge(
    base: Annotated[Path, typer.Option("--base", help="Folder of what the adapter was trained on.")],
    adapter: Annotated[list[Path], typer.Option("--adapter", help="An adapter's folder; may be given again.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to make; must not exist.")],
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", help="A factor for each adapter; without, each is merged into the result before it."),
    ] = None,
    dtype: Annotated[MergedDtype | None, typer.Option("--dtype", help="Of the result; default: the base's.")] = None,
    as_bin: Annotated[
        bool, typer.Option("--bin", help="Write pytorch_model-*.bin, as LLaVAR was released, instead of safetensors.")
    ] = False,
    shard_gb: ShardGigabytes = 5.0,
    force: Annotated[bool, typer.Option("--force", help="Even if an adapter was trained on another base.")] = False,
) -> None:
    """Merge adapters into their base, from disk to disk."""
    from llavar_peft.weights.merge import merge_adapter

    with show_progress("merging") as progress:
        report = merge_adapter(
            base,
            adapter,
            out,
            weights=weight or None,
            dtype=dtype,
            form="bin" if as_bin else "safetensors",
            shard_size=round(shard_gb * 1e9),
            force=force,
            progress=progress,
        )
    say_report(report)
