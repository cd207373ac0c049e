"""Estimate what each resolution costs for LLaVAR-7B and 13B, and write the tables. No GPU is needed.

    python benchmarks/resolution_estimates.py

Every row is ``llavar-peft estimate`` for the last stage of a shipped recipe.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resolution_work import PLAIN, SETTINGS, image_tokens
from train_model import SHAPES

from llavar_peft.preflight.estimate_stage import estimate_stage
from llavar_peft.recipe.presets import load_recipe

GIB = 2**30
NAMES = {"7b": "LLaVAR-7B", "13b": "LLaVAR-13B"}
RECORD = 2048
"""Tokens of a record of a model without a resolution; the others have as many more or fewer as an image has."""
LEGEND = (
    "By `estimate`, not run: a record of 2,048 tokens with the whole image only, and of as many more or fewer as its"
    " image has; one record in a pass, recomputing. QLoRA of the recipes' preset on one GPU; full finetuning, sharded"
    " over 8 GPUs. Memory is in GiB, without about 1 GiB that CUDA itself takes. Operations: of a QLoRA step, as a"
    " multiple of the first line."
)


@dataclass(frozen=True, slots=True)
class Sized:
    """What ``estimate`` says of a model of real size.

    Attributes:
        image_tokens: Tokens of an image.
        record_tokens: Tokens of a record.
        qlora: Memory of the GPU for QLoRA with one record in a pass.
        full: Memory of each of 8 GPUs for full finetuning with one record in a pass.
        flops: Operations of a QLoRA step with one record.
    """

    image_tokens: int
    record_tokens: int
    qlora: int
    full: int
    flops: float


def estimate(size: str, name: str) -> Sized:
    """Estimate a training on one record.

    Args:
        size: ``7b`` or ``13b``.
        name: A key of ``SETTINGS``.
    """
    plain, here = (image_tokens(one, SHAPES["middle"]) for one in (PLAIN, name))
    tokens = RECORD + here - plain

    def estimated(preset: str | None, gpus: int) -> Any:
        recipe = load_recipe(f"llavar-{size}", [], preset=preset)
        stage = replace(
            recipe.stages[-1], max_length=tokens, micro_batch_size=1, global_batch_size=gpus, max_tokens=None
        )
        return estimate_stage(replace(recipe.model, resolution=SETTINGS[name]), stage, gpus=gpus)

    one, eight = estimated("qlora", 1), estimated(None, 8)
    return Sized(one.image_tokens, tokens, one.memory.peak, eight.memory.peak, one.step_flops)


def table(found: dict[str, dict[str, Sized]]) -> str:
    """Format estimates by size and setting as Markdown."""
    lines = []
    for size, by_name in found.items():
        lines += [
            f"### {NAMES[size]}",
            "",
            "| Resolution | Image tokens | Tokens of a record | QLoRA, 1 GPU | Full, 8 GPUs | Operations |",
            "|---|---|---|---|---|---|",
            *(
                f"| {name} | {one.image_tokens:,} | {one.record_tokens:,} | {one.qlora / GIB:.1f} |"
                f" {one.full / GIB:.1f} | {one.flops / by_name[PLAIN].flops:.2f} |"
                for name, one in by_name.items()
            ),
            "",
        ]
    return "\n".join([*lines, LEGEND]) + "\n"


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/resolution_estimates.md")
    arguments = parser.parse_args()
    found = {size: {name: estimate(size, name) for name in SETTINGS} for size in NAMES}
    arguments.out.write_text(table(found), encoding="utf-8")
    print(arguments.out.read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main()
