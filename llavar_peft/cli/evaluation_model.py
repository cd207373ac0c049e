"""The model of the evaluation commands: its options, and how it is loaded and asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from llavar_peft.cli.output import resumable, show_count
from llavar_peft.errors import ConfigError
from llavar_peft.types import Quantization

if TYPE_CHECKING:
    from llavar_peft.data.image_roots import ImageRoots
    from llavar_peft.data.json_schema import AnswerSchema
    from llavar_peft.evaluation.vqa.diagnose_results import Measure
    from llavar_peft.evaluation.vqa.scored_results import Setting
    from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion
    from llavar_peft.inference.chat import Chat

BatchSizeOption: TypeAlias = Annotated[
    int, typer.Option("--batch-size", min=1, help="Number of questions answered at the same time.")
]
PromptOption: TypeAlias = Annotated[
    str, typer.Option("--prompt", help="The prompt, in which {question} is replaced by the question.")
]
LimitOption: TypeAlias = Annotated[int | None, typer.Option("--limit", min=1, help="Use only this many questions.")]
SplitOption: TypeAlias = Annotated[
    str | None, typer.Option("--split", help="Use only the questions of this split: train, val or test.")
]
SamplingSeedOption: TypeAlias = Annotated[int, typer.Option("--seed", min=0, help="Seed of the sampling.")]
EvaluatedModelOption: TypeAlias = Annotated[
    Path | None, typer.Option("--model", help="The folder of the checkpoint, adapter or run to evaluate.")
]
PredictionsOption: TypeAlias = Annotated[
    Path | None, typer.Option("--predictions", help="A file of answers to score, instead of --model.")
]
ResultsOption: TypeAlias = Annotated[
    Path | None,
    typer.Option("--out", help="The results file. Default with --model: <dataset>.results.json in this folder."),
]


def choose_source(command: str, dataset: Path | None, model: Path | None, predictions: Path | None) -> Path:
    """Return the data set, or else the file of answers.

    Raises:
        ConfigError: There is neither a model to ask about a data set nor a file of answers, or there are both.
    """
    source = dataset or predictions
    if source is None or (model is None) == (predictions is None):
        raise ConfigError.at(
            command, "it needs --dataset with --model, or --predictions", "give a model to ask, or answers to score"
        )
    return source


def load_evaluated_model(
    model: Path, adapter: Path | None, vision_tower: str | None, quantize: Quantization | None, setting: Setting
) -> tuple[Chat, Setting]:
    """Load a model, and add its name, hash, image mode and top-k to the setting."""
    from dataclasses import replace

    from llavar_peft.constants import TOP_K
    from llavar_peft.inference.chat import load_chat
    from llavar_peft.weights.adapter.model_hash import identify_model

    chat = load_chat(model, adapter, vision_tower=vision_tower, quantize=quantize)
    name = f"{model} + {adapter}" if adapter else str(model)
    return chat, replace(
        setting,
        model=f"{name} ({quantize})" if quantize else name,
        model_hash=identify_model(model, adapter),
        image_mode=setting.image_mode or chat.engine.processor.inference_image_mode,
        top_k=TOP_K if setting.temperature else None,
    )


def answer_with_progress(
    chat: Chat,
    questions: Sequence[VqaQuestion],
    roots: ImageRoots,
    setting: Setting,
    log: Path,
    schema: AnswerSchema | None = None,
) -> tuple[VqaQuestion, ...]:
    """Answer all questions with a progress bar; answers in the log are not computed again."""
    from llavar_peft.evaluation.vqa.answer_questions import answer_questions

    with resumable(log), show_count("asking") as progress:
        return answer_questions(chat, questions, roots, setting, log, progress, schema=schema)


def measure_letters(
    chat: Chat | None, model: Path | None, questions: Sequence[VqaQuestion], roots: ImageRoots | None, setting: Setting
) -> tuple[Mapping[str, Measure], Callable[[], str | None]]:
    """Return the letter heights of questions, and a function that returns the resolution which reads them all.

    Args:
        chat: The model that answered; None for a file of answers, whose model is taken to see as LLaVAR does.
        model: Its folder.
        questions: The questions, some with the height of their text.
        roots: Folders of the images; None leaves out those whose size is unknown.
        setting: How the answers were generated.
    """
    from llavar_peft.data.image_views import RELEASED_SIDE
    from llavar_peft.evaluation.vqa.diagnose_results import measure_letter_height
    from llavar_peft.evaluation.vqa.results_findings import name_resolution
    from llavar_peft.recipe.resolution import resolution_from

    processor = chat.engine.processor if chat else RELEASED_SIDE
    mode = setting.image_mode or "pad"
    own = resolution_from(chat.engine.processor.resolution, str(model)) if chat else None
    measures = measure_letter_height(questions, roots, mode, processor)
    return measures, lambda: name_resolution(questions, processor, mode, own)
