"""``llavar-peft convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llavar_peft.cli.delta_command import ShardGigabytes, say_report
from llavar_peft.cli.merge_command import MergedDtype
from llavar_peft.cli.output import show_progress


def convert(
    source: Annotated[str, typer.Argument(help="A LLaVAR in any layout: folder or hub name.", metavar="SRC")],
    out: Annotated[Path, typer.Argument(help="Folder to make; must not exist.")],
    to: Annotated[
        Literal["llavar", "original", "hf-llava"],
        typer.Option("--to", help="Our layout, the released one, or that of stock transformers."),
    ],
    vision_tower: Annotated[
        Path | None, typer.Option("--vision-tower", help="CLIP's folder, for a source in the released layout.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Folder with LLaMA's tokenizer.model, for --to original.")
    ] = None,
    projector: Annotated[
        Literal["linear", "two-sided"],
        typer.Option("--projector", help="For --to hf-llava; two-sided is for vLLM, which knows no linear activation."),
    ] = "linear",
    dtype: Annotated[MergedDtype | None, typer.Option("--dtype", help="Of the result; default: the source's.")] = None,
    shard_gb: ShardGigabytes = 5.0,
) -> None:
    """Write a LLaVAR in another layout, from disk to disk."""
    from llavar_peft.models.export_layout import export

    with show_progress("converting") as progress:
        report = export(
            source,
            out,
            to=to,
            vision_tower=vision_tower,
            tokenizer=tokenizer,
            projector=projector,
            dtype=dtype,
            shard_size=round(shard_gb * 1e9),
            progress=progress,
        )
    say_report(report)
