"""``llavar-peft generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llavar_peft.cli import shared_options as shared
from llavar_peft.cli.output import is_first_rank, resumable, say, show_count
from llavar_peft.types import BadImagePolicy


def generate(
    model: shared.ModelOption,
    questions: Annotated[
        Path, typer.Option("--questions", help="JSON lines with question_id, text and optionally image.")
    ],
    answers: Annotated[
        Path, typer.Option("--answers", help="The answers file to write. An incomplete file is continued.")
    ],
    images: Annotated[
        Path | None, typer.Option("--images", help="The folder that the image paths are relative to.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Number of questions answered at the same time.")
    ] = 8,
    adapter: shared.AdapterOption = None,
    vision_tower: shared.VisionTowerOption = None,
    quantize: shared.QuantizeOption = None,
    image_mode: shared.ImageModeOption = None,
    max_new_tokens: shared.MaxNewTokensOption = 1024,
    temperature: shared.TemperatureOption = None,
    greedy: shared.GreedyOption = False,
    seed: shared.SeedOption = None,
    schema: shared.SchemaOption = None,
    on_bad_image: Annotated[
        BadImagePolicy, typer.Option("--on-bad-image", help="What to do about a missing or broken image.")
    ] = "stop",
) -> None:
    """Answer a file of questions, in the format of the original's model_vqa.

    Start it with 'accelerate launch' to use several processes.
    """
    from llavar_peft.inference.answer_file import generate_answers

    sampling = shared.make_sampling(max_new_tokens, temperature, greedy, seed)
    with resumable(answers), show_count("answering") as progress:
        report = generate_answers(
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
            schema=shared.read_schema(schema),
            on_bad_image=on_bad_image,
            progress=progress if is_first_rank() else None,
        )
    if not is_first_rank():
        return
    if report.kept == report.count and not report.seconds:
        say(f"{report.answers}: all questions are answered already; delete the file to answer them again")
        return
    kept = f", {report.kept} of them from an earlier run" if report.kept else ""
    skipped = f"; {len(report.skipped)} skipped because of their images" if report.skipped else ""
    counted = "1 answer" if report.count == 1 else f"{report.count} answers"
    say(f"{report.answers}: {counted} in {report.seconds:.0f} s{kept}{skipped}")
