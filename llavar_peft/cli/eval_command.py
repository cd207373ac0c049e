"""``llavar-peft eval vqa`` and ``mme``: a model is asked a benchmark, or answers that are there are scored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, overload

import typer

from llavar_peft.cli.output import say, say_json, show_count
from llavar_peft.cli.tables import interval, print_table
from llavar_peft.errors import ConfigError
from llavar_peft.recipe.schema import Quantization
from llavar_peft.types import ImageMode

if TYPE_CHECKING:
    from llavar_peft.data.image_preparation import ImageRoots
    from llavar_peft.evaluation.vqa.answer_metrics import Protocol
    from llavar_peft.evaluation.vqa.scored_results import Results, Setting
    from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion
    from llavar_peft.inference.chat import Chat

# Source: LLaVAR, Eval_LLaVAR.py (text VQA) and MME/mme_eval.py.
_VQA_TEMPERATURE, _VQA_TOKENS = 0.9, 256
_MME_TEMPERATURE, _MME_TOKENS = 0.2, 1024
_RELEASED_SIDE = 336  # of the released tower, where no model says another

Images = Annotated[
    list[Path] | None, typer.Option("--images", help="A folder of pictures; several are searched in order.")
]
Model = Annotated[Path | None, typer.Option("--model", help="A checkpoint's folder, an adapter's, or a run's.")]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="An adapter's folder, laid over the model.")]
Tower = Annotated[str | None, typer.Option("--vision-tower", help="CLIP's folder, for a model in the released layout.")]
Quantize = Annotated[Quantization | None, typer.Option("--quantize", help="Store the base in 4 or 8 bits.")]
Mode = Annotated[
    ImageMode | None, typer.Option("--image-mode", help="How pictures are prepared; default: the model's own.")
]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Questions asked at once.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the sampling.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Temperature 0, and reported as such.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]


def vqa(
    context: typer.Context,
    dataset: Annotated[
        Path | None, typer.Option("--dataset", help="Questions: of ST-VQA, TextVQA, DocVQA, OCR-VQA, or anyone's.")
    ] = None,
    images: Images = None,
    model: Model = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", help="Answers that are there already, to be scored only.")
    ] = None,
    adapter: Adapter = None,
    vision_tower: Tower = None,
    quantize: Quantize = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="A protocol; several are fine; default: all that apply.")
    ] = None,
    image_mode: Mode = None,
    prompt: Annotated[str, typer.Option("--prompt", help="What is asked; {question} is the question.")] = "{question}",
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, help="Default: 0.9, the paper's.")
    ] = None,
    greedy: Greedy = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Tokens at most per answer.")
    ] = _VQA_TOKENS,
    batch_size: Batch = 8,
    seed: Seed = 0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Takes the first questions only.")] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Takes those of train, val or test only, where the file says it.")
    ] = None,
    heights: Annotated[
        Path | None,
        typer.Option(
            "--heights",
            help="Records of 'ocr build' on the same pictures: where the data set does not say how high an answer's "
            "letters are, those of its picture are in the median.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Of the data set, e.g. TextVQA, for the paper's figures beside it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The results file; default with a model: <dataset>.results.json here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a model a text VQA benchmark and score it, or score answers that are there.

    Running the same command again goes on where it stopped: finished answers lie beside the results file. With
    --predictions, --prompt, --temperature and the like say how the answers were got, where the file does not.
    """
    from llavar_peft.data.image_preparation import ImageRoots
    from llavar_peft.evaluation.vqa.diagnose_results import borrow_heights, measure_letter_height
    from llavar_peft.evaluation.vqa.scored_results import Setting, score_answers
    from llavar_peft.evaluation.vqa.vqa_questions import read_predictions, read_vqa_questions

    protocols = _protocols(metric or [])
    source = dataset or predictions
    if source is None or (model is None) == (predictions is None):
        raise ConfigError.at(
            "eval vqa", "needs --dataset with --model, or --predictions", "give a model to ask, or answers to score"
        )
    roots = ImageRoots(images) if images else None
    chat = None
    if model is None or dataset is None:
        setting = _stated(context, predictions or source)
        answered = read_predictions(predictions or source, dataset, limit=limit, split=split)
    else:
        questions = read_vqa_questions(dataset, limit=limit, split=split)
        chosen = Setting(
            prompt=prompt,
            image_mode=image_mode,
            temperature=choose_temperature(temperature, _VQA_TEMPERATURE, greedy=greedy),
            max_new_tokens=max_new_tokens,
            seed=seed,
            batch_size=batch_size,
        )
        out = out or Path(f"{dataset.stem}.results.json")
        chat, setting = open_model(model, adapter, vision_tower, quantize, chosen)
        answered = ask_all(chat, questions, roots or ImageRoots(), setting, out.with_suffix(".answers.jsonl"))
    side = int(chat.engine.processor.image_processor.crop_size["height"]) if chat else _RELEASED_SIDE
    measured = borrow_heights(answered, heights) if heights else answered
    measures = measure_letter_height(measured, roots, setting.image_mode or "pad", side)
    _finish(score_answers(answered, name or str(source), setting, protocols, measures), out, as_json=as_json)


def mme(
    context: typer.Context,
    answers: Annotated[
        Path | None,
        typer.Option("--answers", help="Answers that are there: picture, question, truth, answer, by tabs."),
    ] = None,
    folder: Annotated[Path | None, typer.Option("--folder", help="MME's folder OCR, or the whole benchmark.")] = None,
    model: Model = None,
    adapter: Adapter = None,
    vision_tower: Tower = None,
    quantize: Quantize = None,
    image_mode: Mode = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, help="Default: 0.2, the original's.")
    ] = None,
    greedy: Greedy = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Tokens at most per answer.")
    ] = _MME_TOKENS,
    batch_size: Batch = 8,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="The results file; default with a model: mme.results.json here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a model MME's questions about text, or score answers that are there: accuracy and accuracy+, of 200."""
    from llavar_peft.data.image_preparation import ImageRoots
    from llavar_peft.evaluation.vqa.mme_ocr import read_answers, read_folder, score_images
    from llavar_peft.evaluation.vqa.scored_results import Setting

    if answers is not None and folder is None and model is None:
        results = score_images(read_answers(answers), str(answers), _stated(context, answers))
    elif folder is not None and model is not None and answers is None:
        questions, images = read_folder(folder)
        out = out or Path("mme.results.json")
        chosen = Setting(
            prompt="{question}",
            image_mode=image_mode,
            temperature=choose_temperature(temperature, _MME_TEMPERATURE, greedy=greedy),
            max_new_tokens=max_new_tokens,
            seed=seed,
            batch_size=batch_size,
        )
        chat, setting = open_model(model, adapter, vision_tower, quantize, chosen)
        log = out.with_suffix(".answers.jsonl")
        answered = ask_all(chat, questions, ImageRoots(images), setting, log)
        results = score_images(answered, str(folder), setting)
    else:
        raise ConfigError.at(
            "eval mme", "needs --folder with --model, or --answers", "give a model to ask, or answers to score"
        )
    _finish(results, out, as_json=as_json)


def open_model(
    model: Path, adapter: Path | None, vision_tower: str | None, quantize: Quantization | None, setting: Setting
) -> tuple[Chat, Setting]:
    """Open a model, and completes the setting with what it is, how it prepares images and what it draws from."""
    from dataclasses import replace

    from llavar_peft.constants import TOP_K
    from llavar_peft.inference.chat import load_chat
    from llavar_peft.weights.model_hash import identify_model

    chat = load_chat(model, adapter, vision_tower=vision_tower, quantize=quantize)
    name = f"{model} + {adapter}" if adapter else str(model)
    return chat, replace(
        setting,
        model=f"{name} ({quantize})" if quantize else name,
        model_hash=identify_model(model, adapter),
        image_mode=setting.image_mode or chat.engine.processor.inference_image_mode,
        top_k=TOP_K if setting.temperature else None,
    )


def ask_all(
    chat: Chat, questions: Sequence[VqaQuestion], roots: ImageRoots, setting: Setting, log: Path
) -> tuple[VqaQuestion, ...]:
    """Ask everything, with a bar."""
    from llavar_peft.evaluation.vqa.answer_questions import answer_questions

    with show_count("asking") as progress:
        return answer_questions(chat, questions, roots, setting, log, progress)


def _stated(context: typer.Context, answers: Path) -> Setting:
    """How answers that are there were got: as their file says, and as the options say that were given."""
    from llavar_peft.evaluation.vqa.answer_settings import read_setting, merge_settings
    from llavar_peft.evaluation.vqa.scored_results import Setting

    given = {
        name: value
        for name, value in context.params.items()
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    for name in ("adapter", "vision_tower", "quantize"):
        if name in given:
            raise ConfigError.at(
                f"--{name.replace('_', '-')}", f"is of a model, and {answers} is there already", "leave it out"
            )
    temperature = choose_temperature(given.get("temperature"), None, greedy=given.get("greedy", False))
    kept = ("prompt", "image_mode", "max_new_tokens", "seed", "batch_size")
    told = Setting(temperature=temperature, **{name: given[name] for name in kept if name in given})
    return merge_settings(read_setting(answers), told, str(answers))


def _protocols(names: Sequence[str]) -> list[Protocol]:
    from llavar_peft.evaluation.vqa.answer_metrics import PROTOCOLS

    unknown = [name for name in names if name not in PROTOCOLS]
    if unknown:
        raise ConfigError.at("--metric", f"no such protocol (got {unknown[0]!r})", f"use one of {', '.join(PROTOCOLS)}")
    return [protocol for protocol in PROTOCOLS if protocol in names]


@overload
def choose_temperature(given: float | None, protocol: float, *, greedy: bool) -> float: ...
@overload
def choose_temperature(given: float | None, protocol: None, *, greedy: bool) -> float | None: ...
def choose_temperature(given: float | None, protocol: float | None, *, greedy: bool) -> float | None:
    """The temperature that the options come to; the protocol's where they say nothing."""
    if greedy and given:
        raise ConfigError.at("--greedy", f"is temperature 0 (got --temperature {given:g} too)", "give one of them")
    return 0.0 if greedy else protocol if given is None else given


def _finish(results: Results, out: Path | None, *, as_json: bool) -> None:
    from llavar_peft.evaluation.vqa.scored_results import write_results

    if out is not None:
        write_results(results, out)
    if as_json:
        say_json(results.as_dict(records=False))
    else:
        _show(results, out)


def _show(results: Results, out: Path | None) -> None:
    rows = [
        (figure.protocol, f"{figure.value:.2f}", interval(figure), figure.records, "lower" * figure.lower_is_better)
        for figure in results.figures
    ]
    print_table(("protocol", "%", "95 % interval", "records", "better"), rows)
    setting = results.figures[0].as_dict()
    for key in ("model", "model_hash", "prompt", "image_mode", "temperature", "top_k", "decoding"):
        if key != "top_k" or setting["decoding"] == "sampled":
            say(f"{key.replace('_', ' '):<12} {'not said' if setting[key] is None else setting[key]}")
    if out is not None:
        say(f"{'results':<12} {out}")
