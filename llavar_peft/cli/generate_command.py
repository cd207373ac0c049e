"""``llavar-peft generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llavar_peft.cli.output import is_first_rank, say, show_count
from llavar_peft.cli.shared_options import (
    AdapterOption,
    GreedyOption,
    ImageModeOption,
    MaxNewTokensOption,
    ModelOption,
    QuantizeOption,
    SeedOption,
    TemperatureOption,
    VisionTowerOption,
    make_sampling,
)
from llavar_peft.recipe.schema import BadImagePolicy


def generate(
    model: ModelOption,
    questions: Annotated[
        Path, typer.Option("--questions", help="JSON lines with question_id, text and perhaps image.")
    ],
    answers: Annotated[Path, typer.Option("--answers", help="The file to write; an unfinished one is gone on with.")],
    images: Annotated[
        Path | None, typer.Option("--images", help="The folder that the pictures' paths start from.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions answered at a time.")] = 8,
    adapter: AdapterOption = None,
    vision_tower: VisionTowerOption = None,
    quantize: QuantizeOption = None,
    image_mode: ImageModeOption = None,
    max_new_tokens: MaxNewTokensOption = 1024,
    temperature: TemperatureOption = None,
    greedy: GreedyOption = False,
    seed: SeedOption = None,
    on_bad_image: Annotated[
        BadImagePolicy, typer.Option("--on-bad-image", help="What a missing or broken picture does.")
    ] = "stop",
) -> None:
    """Answer a file of questions, as the original's model_vqa does; several processes by accelerate launch."""
    from llavar_peft.inference.answer_file import generate_answers as answer_file

    sampling = make_sampling(max_new_tokens, temperature, greedy, seed)
    with show_count("answering") as progress:
        report = answer_file(
            model,
            questions,
            images,
            answers,
            sampling=sampling,
            batch_size=batch_size,
            adapter=adapter,
            vision_tower=vision_tower,
            quantize=quantize,
            image_mode=image_mode,
            on_bad_image=on_bad_image,
            progress=progress if is_first_rank() else None,
        )
    if not is_first_rank():
        return
    if report.kept == report.count and not report.seconds:
        say(f"{report.answers}: {report.count} answers were there already; remove it to ask again")
        return
    kept = f", {report.kept} of them from before" if report.kept else ""
    skipped = f"; {len(report.skipped)} skipped for their pictures" if report.skipped else ""
    say(f"{report.answers}: {report.count} answers in {report.seconds:.0f} s{kept}{skipped}")
