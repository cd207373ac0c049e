"""``llavar-peft eval vqa`` and ``eval mme``: scores on benchmarks of text in images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from llavar_peft.atomic_files import check_output_file
from llavar_peft.cli import evaluation_model as evaluated
from llavar_peft.cli import shared_options as shared
from llavar_peft.cli.output import format_interval, print_table, say, say_json, say_next
from llavar_peft.errors import ConfigError

if TYPE_CHECKING:
    from llavar_peft.evaluation.vqa.answer_metrics import Protocol
    from llavar_peft.evaluation.vqa.benchmark_protocols import BenchmarkProtocol
    from llavar_peft.evaluation.vqa.scored_results import Results, Setting

# Source: LLaVAR, Eval_LLaVAR.py (text VQA) and MME/mme_eval.py.
_VQA_TEMPERATURE, _VQA_TOKENS = 0.9, 256
_MME_TEMPERATURE, _MME_TOKENS = 0.2, 1024

VqaTemperature: TypeAlias = Annotated[
    float | None,
    typer.Option("--temperature", min=0.0, help="Sampling temperature. Default: 0.9, as in the paper."),
]
MmeTemperature: TypeAlias = Annotated[
    float | None,
    typer.Option("--temperature", min=0.0, help="Sampling temperature. Default: 0.2, as in the original."),
]


def eval_vqa(
    context: typer.Context,
    dataset: Annotated[
        Path | None,
        typer.Option(
            "--dataset",
            help="The questions: a file of ST-VQA, TextVQA, DocVQA, OCR-VQA, ChartQA, ScienceQA, CT80 or POIE, "
            "or your own.",
        ),
    ] = None,
    images: shared.ImagesOption = None,
    model: evaluated.EvaluatedModelOption = None,
    predictions: evaluated.PredictionsOption = None,
    adapter: shared.AdapterOption = None,
    vision_tower: shared.VisionTowerOption = None,
    quantize: shared.QuantizeOption = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", help="A scoring protocol. Repeat the option for several. Default: all general ones that apply."
        ),
    ] = None,
    image_mode: shared.ImageModeOption = None,
    prompt: evaluated.PromptOption = "{question}",
    temperature: VqaTemperature = None,
    greedy: shared.GreedyOption = False,
    max_new_tokens: shared.MaxNewTokensOption = _VQA_TOKENS,
    batch_size: evaluated.BatchSizeOption = 8,
    seed: evaluated.SamplingSeedOption = 0,
    limit: evaluated.LimitOption = None,
    split: evaluated.SplitOption = None,
    heights: Annotated[
        Path | None,
        typer.Option(
            "--heights",
            help="Records of 'ocr build' for the same images. Where the data set does not give the height of an "
            "answer's letters, the median height in its image is used.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="The data set's name, e.g. TextVQA, to show the paper's figures next to yours."),
    ] = None,
    out: evaluated.ResultsOption = None,
    as_json: shared.JsonOption = False,
) -> None:
    """Score a model, or a file of answers, on a benchmark of questions about text in images.

    Run the same command again to resume: answers are saved next to the results file.

    With --predictions, options such as --prompt and --temperature state how the answers were made, where the file does
    not say so.
    """
    from llavar_peft.data.image_roots import ImageRoots
    from llavar_peft.evaluation.vqa.diagnose_results import borrow_heights
    from llavar_peft.evaluation.vqa.scored_results import Setting, score_answers
    from llavar_peft.evaluation.vqa.vqa_questions import read_predictions, read_vqa_questions

    protocols = _choose_protocols(metric or [])
    source = evaluated.choose_source("eval vqa", dataset, model, predictions)
    roots = ImageRoots(images) if images else None
    chat = None
    if model is None or dataset is None:
        setting = stated_setting(context, predictions or source)
        answered = read_predictions(predictions or source, dataset, limit=limit, split=split)
    else:
        questions = read_vqa_questions(dataset, limit=limit, split=split)
        chosen = Setting(
            prompt=prompt,
            image_mode=image_mode,
            temperature=shared.choose_temperature(temperature, _VQA_TEMPERATURE, greedy=greedy),
            max_new_tokens=max_new_tokens,
            seed=seed,
            batch_size=batch_size,
        )
        out = out or Path(f"{dataset.stem}.results.json")
        check_output_file(out, "--out")
        chat, setting = evaluated.load_evaluated_model(model, adapter, vision_tower, quantize, chosen)
        log = out.with_suffix(".answers.jsonl")
        answered = evaluated.answer_with_progress(chat, questions, roots or ImageRoots(), setting, log)
    measured = borrow_heights(answered, heights) if heights else answered
    measures, resolution = evaluated.measure_letters(chat, model, measured, roots, setting)
    results = score_answers(answered, name or str(source), setting, protocols, measures)
    report_results(results, out, as_json=as_json, resolution=resolution)


def eval_mme(
    context: typer.Context,
    answers: Annotated[
        Path | None,
        typer.Option(
            "--answers", help="A file of answers to score: image, question, truth and answer, separated by tabs."
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="The folder of the MME benchmark, or its OCR folder.")
    ] = None,
    model: evaluated.EvaluatedModelOption = None,
    adapter: shared.AdapterOption = None,
    vision_tower: shared.VisionTowerOption = None,
    quantize: shared.QuantizeOption = None,
    image_mode: shared.ImageModeOption = None,
    temperature: MmeTemperature = None,
    greedy: shared.GreedyOption = False,
    max_new_tokens: shared.MaxNewTokensOption = _MME_TOKENS,
    batch_size: evaluated.BatchSizeOption = 8,
    seed: evaluated.SamplingSeedOption = 0,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The results file. Default with --model: mme.results.json in this folder."),
    ] = None,
    as_json: shared.JsonOption = False,
) -> None:
    """Score a model, or a file of answers, on MME's questions about text.

    The score is accuracy plus accuracy+, at most 200.
    """
    from llavar_peft.data.image_roots import ImageRoots
    from llavar_peft.evaluation.vqa.mme_ocr import read_answers, read_folder, score_images
    from llavar_peft.evaluation.vqa.scored_results import Setting

    if answers is not None and folder is None and model is None:
        results = score_images(read_answers(answers), str(answers), stated_setting(context, answers))
    elif folder is not None and model is not None and answers is None:
        questions, images = read_folder(folder)
        out = out or Path("mme.results.json")
        check_output_file(out, "--out")
        chosen = Setting(
            prompt="{question}",
            image_mode=image_mode,
            temperature=shared.choose_temperature(temperature, _MME_TEMPERATURE, greedy=greedy),
            max_new_tokens=max_new_tokens,
            seed=seed,
            batch_size=batch_size,
        )
        chat, setting = evaluated.load_evaluated_model(model, adapter, vision_tower, quantize, chosen)
        log = out.with_suffix(".answers.jsonl")
        answered = evaluated.answer_with_progress(chat, questions, ImageRoots(images), setting, log)
        results = score_images(answered, str(folder), setting)
    else:
        raise ConfigError.at(
            "eval mme", "it needs --folder with --model, or --answers", "give a model to ask, or answers to score"
        )
    report_results(results, out, as_json=as_json)


def stated_setting(context: typer.Context, answers: Path) -> Setting:
    """Return how given answers were made: what their file says, completed by the options on the command line."""
    from llavar_peft.evaluation.vqa.answer_settings import merge_settings, read_setting
    from llavar_peft.evaluation.vqa.scored_results import Setting

    given = {
        name: value
        for name, value in context.params.items()
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    for name in ("adapter", "vision_tower", "quantize"):
        if name in given:
            raise ConfigError.at(
                f"--{name.replace('_', '-')}",
                f"it has no effect on the answers in {answers}",
                "leave it out",
            )
    temperature = shared.choose_temperature(given.get("temperature"), None, greedy=given.get("greedy", False))
    names = ("prompt", "image_mode", "max_new_tokens", "seed", "batch_size")
    stated = Setting(temperature=temperature, **{name: given[name] for name in names if name in given})
    return merge_settings(read_setting(answers), stated, str(answers))


def _choose_protocols(names: Sequence[str]) -> list[Protocol | BenchmarkProtocol]:
    from llavar_peft.evaluation.vqa.answer_metrics import PROTOCOLS
    from llavar_peft.evaluation.vqa.benchmark_protocols import BENCHMARK_PROTOCOLS, check_packages

    known: list[Protocol | BenchmarkProtocol] = [*PROTOCOLS, *BENCHMARK_PROTOCOLS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError.at("--metric", f"unknown protocol (got {unknown[0]!r})", f"use one of {', '.join(known)}")
    check_packages(names)
    return [protocol for protocol in known if protocol in names]


def report_results(
    results: Results, out: Path | None, *, as_json: bool, resolution: Callable[[], str | None] | None = None
) -> None:
    """Write results to a file, and print their figures, their setting, and what they say about the next step.

    Args:
        results: The results.
        out: The file; None writes none.
        as_json: Whether to print JSON only.
        resolution: Returns the line of the recipe with a resolution that reads letters that are too small.
    """
    from dataclasses import replace

    from llavar_peft.evaluation.vqa.results_findings import find_in_results
    from llavar_peft.evaluation.vqa.scored_results import write_results

    protocol = next(iter(results.records[0].scores))
    findings = find_in_results(results, protocol)
    if resolution is not None and any(one.kind == "small" for one in findings):
        results = replace(results, resolution=resolution())
        findings = find_in_results(results, protocol)
    if out is not None:
        check_output_file(out, "--out")
        write_results(results, out)
    if as_json:
        say_json(results.as_dict(records=False))
        return
    rows = [
        (
            one.protocol,
            f"{one.value:.2f}",
            format_interval(one.low, one.high),
            one.records,
            "lower" * one.lower_is_better,
        )
        for one in results.figures
    ]
    print_table(("protocol", "%", "95 % interval", "records", "better"), rows)
    setting = results.figures[0].as_dict()
    for key in ("model", "model_hash", "prompt", "image_mode", "temperature", "top_k", "decoding"):
        if key != "top_k" or setting["decoding"] == "sampled":
            say(f"{key.replace('_', ' '):<12} {'unknown' if setting[key] is None else setting[key]}")
    if out is not None:
        say(f"{'results':<12} {out}")
    say_next(findings)
