"""``llavar-peft quickstart``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llavar_peft.cli.output import is_first_rank, say

_DEFAULT_FOLDER = Path("runs/quickstart")


def quickstart(
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Folder of everything it makes.")] = _DEFAULT_FOLDER,
    tune: Annotated[Literal["full", "lora", "qlora"], typer.Option("--tune", help="How stage 2 trains.")] = "full",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws the data and the order of training.")] = 0,
) -> None:
    """Teach a tiny LLaVAR to read, on a CPU, in minutes; run again, it goes on where it stopped."""
    from llavar_peft.quickstart import run_quickstart

    result = run_quickstart(output_dir, tune, seed=seed)
    if not is_first_rank():
        return
    say(f"exact match on unseen pictures  {result.exact_match:.1%}")
    say(f"  before any training           {result.before:.1%}")
    say(f"  with the pictures blanked     {result.blank_exact_match:.1%}")
    say(f"page   {result.page}")
    say(f"model  {result.model}")
    say(f'ask    llavar-peft ask --model {result.model} --image FILE "What does the sign say?"')
