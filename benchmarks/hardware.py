"""Estimate which tuning fits on which GPU, and write the table that the README shows. No GPU is needed.

    python benchmarks/hardware.py

Every row is ``llavar-peft estimate`` for the last stage of a shipped recipe at 2,048 tokens per record.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from llavar_peft.preflight.estimate_stage import estimate_stage
from llavar_peft.recipe.presets import load_recipe

CARDS = (12, 16, 24, 48, 80, 141)
"""Memory sizes of common GPUs, in GiB as the driver reports them and in GB as they are sold."""
MARGIN = 1.05
"""The estimate counts tensors; the allocator and the libraries need a little more."""
CUDA = 2**30
"""Bytes that CUDA itself takes."""


@dataclass(frozen=True)
class Case:
    """One row: a recipe with a preset, on a number of GPUs."""

    tuning: str
    recipe: str
    preset: str | None
    micro_batch_size: int
    gpus: int = 1


CASES = (
    Case("7B, QLoRA (nf4)", "llavar-7b", "qlora", 1),
    Case("7B, QLoRA (nf4)", "llavar-7b", "qlora", 4),
    Case("7B, LoRA (bfloat16)", "llavar-7b", "lora", 1),
    Case("7B, full", "llavar-7b", None, 1),
    Case("7B, full, FSDP2", "llavar-7b", None, 4, gpus=8),
    Case("13B, QLoRA (nf4)", "llavar-13b", "qlora", 1),
    Case("13B, QLoRA (nf4)", "llavar-13b", "qlora", 4),
    Case("13B, LoRA (bfloat16)", "llavar-13b", "lora", 1),
    Case("13B, full, FSDP2", "llavar-13b", None, 4, gpus=8),
    Case("13B, full, FSDP2", "llavar-13b", None, 4, gpus=16),
)


def row(case: Case) -> str:
    """Return the table row of a case."""
    recipe = load_recipe(case.recipe, [f"stages.1.micro_batch_size={case.micro_batch_size}"], preset=case.preset)
    peak = estimate_stage(recipe.model, recipe.stages[-1], gpus=case.gpus).memory.peak
    fitting = [card for card in CARDS if peak * MARGIN + CUDA <= card * 2**30]
    smallest = f"{fitting[0]} GB" if fitting else "none of these"
    return f"| {case.tuning} | {case.micro_batch_size} | {case.gpus} | {peak / 2**30:.1f} | {smallest} |"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/hardware.md")
    arguments = parser.parse_args()
    lines = [
        "| Model and tuning | Records per forward pass | GPUs | Peak per GPU, GiB | Smallest GPU |",
        "|---|---|---|---|---|",
        *map(row, CASES),
    ]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(arguments.out.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
