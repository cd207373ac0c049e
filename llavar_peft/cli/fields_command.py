"""``llavar-peft eval fields``: how well the fields of forms are extracted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llavar_peft.atomic_files import check_output_file
from llavar_peft.cli import evaluation_model as evaluated
from llavar_peft.cli import shared_options as shared
from llavar_peft.cli.eval_command import report_results, stated_setting


def eval_fields(
    context: typer.Context,
    dataset: Annotated[
        Path | None,
        typer.Option("--dataset", help="Records whose answers are JSON, as those of 'synth --task extract'."),
    ] = None,
    images: shared.ImagesOption = None,
    model: evaluated.EvaluatedModelOption = None,
    predictions: evaluated.PredictionsOption = None,
    adapter: shared.AdapterOption = None,
    vision_tower: shared.VisionTowerOption = None,
    quantize: shared.QuantizeOption = None,
    schema: shared.SchemaOption = None,
    image_mode: shared.ImageModeOption = None,
    prompt: evaluated.PromptOption = "{question}",
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, help="Sampling temperature. Default: 0, greedy.")
    ] = None,
    max_new_tokens: shared.MaxNewTokensOption = 512,
    batch_size: evaluated.BatchSizeOption = 8,
    seed: evaluated.SamplingSeedOption = 0,
    limit: evaluated.LimitOption = None,
    split: evaluated.SplitOption = None,
    name: Annotated[str | None, typer.Option("--name", help="The data set's name, e.g. CORD.")] = None,
    out: evaluated.ResultsOption = None,
    as_json: shared.JsonOption = False,
) -> None:
    """Score a model, or a file of answers, on the fields of receipts, invoices and other forms.

    Answers that are no JSON count as answers without fields. Run the same command again to resume.
    """
    from llavar_peft.data.image_roots import ImageRoots
    from llavar_peft.evaluation.fields.score_fields import score_forms
    from llavar_peft.evaluation.vqa.scored_results import Setting
    from llavar_peft.evaluation.vqa.vqa_questions import read_predictions, read_vqa_questions

    source = evaluated.choose_source("eval fields", dataset, model, predictions)
    roots = ImageRoots(images) if images else None
    chat = None
    if model is None or dataset is None:
        setting = stated_setting(context, predictions or source)
        answered = read_predictions(predictions or source, dataset, limit=limit, split=split)
    else:
        questions = read_vqa_questions(dataset, limit=limit, split=split)
        form = shared.read_schema(schema)
        chosen = Setting(
            prompt=prompt,
            image_mode=image_mode,
            temperature=temperature or 0.0,
            max_new_tokens=max_new_tokens,
            seed=seed,
            batch_size=batch_size,
        )
        out = out or Path(f"{dataset.stem}.results.json")
        check_output_file(out, "--out")
        chat, setting = evaluated.load_evaluated_model(model, adapter, vision_tower, quantize, chosen)
        log = out.with_suffix(".answers.jsonl")
        answered = evaluated.answer_with_progress(chat, questions, roots or ImageRoots(), setting, log, form)
    measures, resolution = evaluated.measure_letters(chat, model, answered, roots, setting)
    results = score_forms(answered, name or str(source), setting, measures)
    report_results(results, out, as_json=as_json, resolution=resolution)
