"""``llavar-peft eval answer``, ``eval judge`` and ``eval summarize``: evaluation by GPT-4 or another judge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llavar_peft.atomic_files import check_output_file
from llavar_peft.cli import evaluation_model as evaluated
from llavar_peft.cli import shared_options as shared
from llavar_peft.cli.output import print_table, resumable, say, say_json, show_count

if TYPE_CHECKING:
    from llavar_peft.evaluation.judge.judge_reviews import Summary
    from llavar_peft.evaluation.judge.run_judge import Judged

_ANSWER_TEMPERATURE = 0.7  # Source: LLaVAR, llava/eval/model_vqa.py
_INCOMPLETE = 3  # exit status: the endpoint, not the input, is the reason that a question has no scores


def eval_answer(
    questions: Annotated[Path, typer.Option("--questions", help="JSON lines with question_id, image and text.")],
    images: Annotated[
        list[Path],
        typer.Option("--images", help="A folder of images. Repeat the option to search several folders in order."),
    ],
    model: Annotated[Path, typer.Option("--model", help="The folder of the checkpoint, adapter or run to evaluate.")],
    out: Annotated[Path, typer.Option("--out", help="The answers file to write, in the original's format.")],
    adapter: shared.AdapterOption = None,
    vision_tower: shared.VisionTowerOption = None,
    quantize: shared.QuantizeOption = None,
    image_mode: shared.ImageModeOption = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", min=0.0, help="Sampling temperature. Default: 0.7, as in the original."),
    ] = None,
    greedy: shared.GreedyOption = False,
    max_new_tokens: shared.MaxNewTokensOption = 1024,
    batch_size: evaluated.BatchSizeOption = 8,
    seed: evaluated.SamplingSeedOption = 0,
) -> None:
    """Let a model answer the questions for 'eval judge'.

    Run the same command again to resume.
    """
    from llavar_peft.data.image_roots import ImageRoots
    from llavar_peft.evaluation.judge.judge_cases import read_unanswered, write_judge_answers
    from llavar_peft.evaluation.vqa.scored_results import Setting

    check_output_file(out, "--out")
    roots = ImageRoots(images)
    unanswered = read_unanswered(questions, roots)
    chosen = Setting(
        prompt="{question}",
        image_mode=image_mode,
        temperature=shared.choose_temperature(temperature, _ANSWER_TEMPERATURE, greedy=greedy),
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
    )
    chat, setting = evaluated.load_evaluated_model(model, adapter, vision_tower, quantize, chosen)
    answered = evaluated.answer_with_progress(chat, unanswered, roots, setting, out.with_suffix(".part.jsonl"))
    write_judge_answers(answered, setting, out)
    say(str(out))


def eval_judge(
    questions: Annotated[
        Path, typer.Option("--questions", help="JSON lines with question_id, image, text and category.")
    ],
    contexts: Annotated[
        Path, typer.Option("--contexts", help="JSON lines with image, captions and optionally instances.")
    ],
    rules: Annotated[
        Path, typer.Option("--rules", help="The judge's instructions: rule.json, or rule_read_v3.json for reading.")
    ],
    reference: Annotated[
        Path, typer.Option("--reference", help="JSON lines of the answers to compare with, in the paper GPT-4's.")
    ],
    answers: Annotated[
        Path, typer.Option("--answers", help="JSON lines of the model's answers, with question_id and text.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The reviews file to write, in the original's format.")],
    model: Annotated[str, typer.Option("--judge-model", help="The judge's name at the endpoint.")] = "gpt-4",
    base_url: Annotated[
        str | None,
        typer.Option(
            "--base-url", help="The URL of an OpenAI-compatible endpoint. Default: OPENAI_BASE_URL, else OpenAI."
        ),
    ] = None,
    swap: Annotated[
        bool,
        typer.Option("--swap", help="Judge each question again with the answers swapped, and report the agreement."),
    ] = False,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="The judge's temperature; 0.2 as in the original.")
    ] = 0.2,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Largest number of tokens in a reply.")] = 1024,
    attempts: Annotated[
        int, typer.Option("--attempts", min=1, help="Largest number of requests until a reply has scores.")
    ] = 3,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Number of requests at the same time.")] = 4,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="A folder that keeps the replies. Default: next to --out, ending in .replies."),
    ] = None,
    as_json: shared.JsonOption = False,
) -> None:
    """Let GPT-4 or another judge compare a model's answers with reference answers.

    The judge is any model at an OpenAI-compatible endpoint. The API key is read from OPENAI_API_KEY. Replies are
    cached, so that an interrupted run can be resumed. The exit status is 3 if some questions have no scores.
    """
    from llavar_peft.evaluation.judge.judge_cases import read_cases
    from llavar_peft.evaluation.judge.judge_client import Judge, JudgeConfig
    from llavar_peft.evaluation.judge.judge_reviews import summarize_reviews, write_reviews
    from llavar_peft.evaluation.judge.run_judge import judge_cases

    check_output_file(out, "--out")
    config = JudgeConfig(
        model=model,
        base_url=base_url,
        temperature=temperature,
        max_tokens=max_tokens,
        attempts=attempts,
        concurrency=concurrency,
    )
    client = Judge(config, cache or out.with_suffix(".replies"))
    cases = read_cases(questions, contexts, rules, reference, answers)
    with resumable(out), show_count("judging") as progress:
        judged = judge_cases(cases, client, swap=swap, progress=progress)
        write_reviews(judged.reviews, out)
    summary = summarize_reviews(judged.reviews)
    if as_json:
        say_json({"judge": model, "temperature": temperature, **_count_replies(judged), **summary.as_dict()})
    else:
        _print_summary(summary)
        say(f"{judged.sent} new replies by {model} at temperature {temperature:g}, {judged.known} from the cache")
        say(f"{judged.malformed} replies without scores and {judged.refused} refusals, which are requested again")
    if summary.unscored:
        raise typer.Exit(_INCOMPLETE)


def eval_summarize(
    reviews: Annotated[list[Path], typer.Argument(help="Files that 'eval judge' wrote.", metavar="REVIEWS...")],
    as_json: shared.JsonOption = False,
) -> None:
    """Show the scores in files of reviews: the model's mean in percent of the reference's mean."""
    from llavar_peft.evaluation.judge.judge_reviews import read_reviews, summarize_reviews

    summaries = [summarize_reviews(read_reviews(path)) for path in reviews]
    if as_json:
        say_json([{"reviews": str(path), **one.as_dict()} for path, one in zip(reviews, summaries, strict=True)])
        return
    for path, one in zip(reviews, summaries, strict=True):
        if len(reviews) > 1:
            say(str(path))
        _print_summary(one)


def _count_replies(judged: Judged) -> dict[str, int]:
    return {
        "sent": judged.sent, "known": judged.known, "malformed": judged.malformed, "refused": judged.refused,
    }  # fmt: skip


def _print_summary(summary: Summary) -> None:
    swapped = any(category.agreement is not None for category in summary.categories)
    titles = ["category", "reviews", "reference", "ours", "ratio %", "95 % interval"]
    rows = []
    for one in summary.categories:
        row: list[object] = [
            one.name, one.reviews, f"{one.reference:.3f}", f"{one.ours:.3f}",
            *(("-", "-") if one.ratio is None else (f"{one.ratio:.1f}", f"{one.low:.1f} to {one.high:.1f}")),
        ]  # fmt: skip
        rows.append([*row, one.swapped_ratio, one.agreement] if swapped else row)
    print_table([*titles, "ratio swapped %", "agreement %"] if swapped else titles, rows)
    if summary.unscored:
        unscored = ", ".join(str(question) for question in summary.unscored)
        say(f"excluded, because they have no scores{' in one order or both' if swapped else ''}: {unscored}")
    for setting in summary.settings:
        say("; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in setting.items()))
