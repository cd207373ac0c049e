"""``llavar-peft convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llavar_peft.cli.output import say_weights, show_progress
from llavar_peft.cli.push_command import (
    BaseNameOption,
    PrivateOption,
    PushOption,
    check_push_option,
    push_result,
)
from llavar_peft.cli.shared_options import DtypeOption, ShardGigabytes
from llavar_peft.errors import ConfigError


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A LLaVA or LLaVAR in any layout, or a LoRA of LLaVA: a folder or a hub name.", metavar="SRC"
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to create. It must not exist.", metavar="OUT")],
    to: Annotated[
        Literal["llavar", "original", "hf-llava", "adapter", "gguf"],
        typer.Option(
            "--to",
            help="The layout to write: llavar for this package, original as LLaVAR was released, hf-llava for "
            "transformers without this package, adapter for this package from a LoRA of LLaVA's own code, gguf for "
            "llama.cpp, LM Studio and Ollama.",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Option("--base", help="For --to adapter: the model it was trained on. Default: the one its files name."),
    ] = None,
    vision_tower: Annotated[
        Path | None,
        typer.Option("--vision-tower", help="The CLIP folder, for a source in the released layout or an adapter."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="A folder with LLaMA's tokenizer.model, for --to original.")
    ] = None,
    projector: Annotated[
        Literal["linear", "two-sided"],
        typer.Option(
            "--projector",
            help="How --to hf-llava writes a linear projector. With two-sided, vLLM's own LLaVA needs no options; it "
            "requires a language model twice as wide as the tower.",
        ),
    ] = "linear",
    quantize: Annotated[
        Literal["nf4"] | None,
        typer.Option(
            "--quantize",
            help="Store the language model's linear layers in 4 bits, for --to llavar. Such a model is not quantized "
            "again when it is loaded.",
        ),
    ] = None,
    outtype: Annotated[
        Literal["f16", "q8_0", "bf16"] | None,
        typer.Option("--outtype", help="How --to gguf stores matrices: in 16 bits, or in 8. Default: f16."),
    ] = None,
    dtype: DtypeOption = None,
    shard_gb: ShardGigabytes = 5.0,
    push: PushOption = None,
    private: PrivateOption = False,
    base_name: BaseNameOption = None,
) -> None:
    """Convert a LLaVA or LLaVAR to another layout, from disk to disk."""
    from llavar_peft.models.export_layout import export

    if push is not None and to == "gguf":
        raise ConfigError.at(
            "--push", "files for llama.cpp have no card that could name their base", "use `hf upload OWNER/NAME OUT`"
        )
    check_push_option(push, private, base_name, None if to == "adapter" else [source])

    with show_progress("converting") as progress:
        report = export(
            source,
            out,
            to=to,
            base=base,
            vision_tower=vision_tower,
            tokenizer=tokenizer,
            projector=projector,
            quantize=quantize,
            dtype=dtype,
            outtype=outtype,
            shard_size=round(shard_gb * 1e9),
            progress=progress,
        )
    say_weights(report)
    push_result(report.out, push, private, base_name)
