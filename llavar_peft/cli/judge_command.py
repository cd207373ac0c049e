"""``llavar-peft eval answer``, ``judge`` and ``summarize``: GPT-4 as judge, and what its reviews come to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llavar_peft.cli.eval_command import (
    Adapter,
    AsJson,
    Batch,
    Greedy,
    Mode,
    Quantize,
    Seed,
    Tower,
    ask_all,
    choose_temperature,
    open_model,
)
from llavar_peft.cli.output import say, say_json, show_count
from llavar_peft.cli.tables import print_table

if TYPE_CHECKING:
    from llavar_peft.evaluation.judge.judge_reviews import Summary
    from llavar_peft.evaluation.judge.run_judge import Judged

_ANSWER_TEMPERATURE = 0.7  # Source: LLaVAR, llava/eval/model_vqa.py
_INCOMPLETE = 3  # the endpoint, not the input, is why a question has no scores


def answer(
    questions: Annotated[Path, typer.Option("--questions", help="JSON lines: question_id, image, text.")],
    images: Annotated[
        list[Path], typer.Option("--images", help="A folder of pictures; several are searched in order.")
    ],
    model: Annotated[Path, typer.Option("--model", help="A checkpoint's folder, an adapter's, or a run's.")],
    out: Annotated[Path, typer.Option("--out", help="The answers, in the original's form.")],
    adapter: Adapter = None,
    vision_tower: Tower = None,
    quantize: Quantize = None,
    image_mode: Mode = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0.0, help="Default: 0.7, the original's.")
    ] = None,
    greedy: Greedy = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens at most per answer.")] = 1024,
    batch_size: Batch = 8,
    seed: Seed = 0,
) -> None:
    """Have a model answer the questions that 'eval judge' is to judge. Running it again goes on where it stopped."""
    from llavar_peft.data.image_preparation import ImageRoots
    from llavar_peft.evaluation.judge.judge_cases import read_unanswered, write_judge_answers
    from llavar_peft.evaluation.vqa.scored_results import Setting

    roots = ImageRoots(images)
    asked = read_unanswered(questions, roots)
    chosen = Setting(
        prompt="{question}",
        image_mode=image_mode,
        temperature=choose_temperature(temperature, _ANSWER_TEMPERATURE, greedy=greedy),
        max_new_tokens=max_new_tokens,
        seed=seed,
        batch_size=batch_size,
    )
    chat, setting = open_model(model, adapter, vision_tower, quantize, chosen)
    write_judge_answers(ask_all(chat, asked, roots, setting, out.with_suffix(".part.jsonl")), setting, out)
    say(str(out))


def judge(
    questions: Annotated[Path, typer.Option("--questions", help="JSON lines: question_id, image, text, category.")],
    contexts: Annotated[Path, typer.Option("--contexts", help="JSON lines: image, captions, perhaps instances.")],
    rules: Annotated[Path, typer.Option("--rules", help="rule.json, or rule_read_v3.json for the read questions.")],
    reference: Annotated[
        Path, typer.Option("--reference", help="JSON lines of answers to hold ours against: GPT-4's.")
    ],
    answers: Annotated[Path, typer.Option("--answers", help="JSON lines of our answers: question_id, text.")],
    out: Annotated[Path, typer.Option("--out", help="The reviews, in the original's form.")],
    model: Annotated[str, typer.Option("--judge-model", help="The judge's name at the endpoint.")] = "gpt-4",
    base_url: Annotated[
        str | None,
        typer.Option("--base-url", help="An OpenAI-compatible endpoint; default: OpenAI's, or OPENAI_BASE_URL."),
    ] = None,
    swap: Annotated[
        bool, typer.Option("--swap", help="Judge each a second time with our answer first, and report the agreement.")
    ] = False,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="The original's is 0.2.")] = 0.2,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Of a reply.")] = 1024,
    attempts: Annotated[int, typer.Option("--attempts", min=1, help="Times to ask where no scores come back.")] = 3,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests under way at once.")] = 4,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Folder of replies that are not asked for again; default: beside --out."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Have GPT-4, or any model at an OpenAI-compatible endpoint, judge answers against the reference's.

    The key comes from OPENAI_API_KEY. Replies are kept: a broken run costs nothing twice.
    """
    from llavar_peft.evaluation.judge.judge_cases import read_cases
    from llavar_peft.evaluation.judge.judge_client import Judge, JudgeConfig
    from llavar_peft.evaluation.judge.judge_reviews import summarize_reviews, write_reviews
    from llavar_peft.evaluation.judge.run_judge import judge_cases

    cases = read_cases(questions, contexts, rules, reference, answers)
    config = JudgeConfig(
        model=model,
        base_url=base_url,
        temperature=temperature,
        max_tokens=max_tokens,
        attempts=attempts,
        concurrency=concurrency,
    )
    asked = Judge(config, cache or out.with_suffix(".replies"))
    with show_count("judging") as progress:
        judged = judge_cases(cases, asked, swap=swap, progress=progress)
    write_reviews(judged.reviews, out)
    summary = summarize_reviews(judged.reviews)
    if as_json:
        say_json({"judge": model, "temperature": temperature, **_counts(judged), **summary.as_dict()})
    else:
        _show(summary)
        say(f"{judged.sent} replies by {model} at temperature {temperature:g}, {judged.known} known from before")
        say(f"{judged.malformed} replies had no scores, {judged.refused} were refusals; such are asked for again")
    if summary.unscored:
        raise typer.Exit(_INCOMPLETE)


def summarize(
    reviews: Annotated[list[Path], typer.Argument(help="Files of reviews.", metavar="REVIEWS...")],
    as_json: AsJson = False,
) -> None:
    """Show what reviews come to: ours in percent of the reference, as the ratio of the means."""
    from llavar_peft.evaluation.judge.judge_reviews import read_reviews, summarize_reviews

    summaries = [summarize_reviews(read_reviews(path)) for path in reviews]
    if as_json:
        say_json([{"reviews": str(path), **one.as_dict()} for path, one in zip(reviews, summaries, strict=True)])
        return
    for path, one in zip(reviews, summaries, strict=True):
        if len(reviews) > 1:
            say(str(path))
        _show(one)


def _counts(judged: Judged) -> dict[str, int]:
    return {
        "sent": judged.sent, "known": judged.known, "malformed": judged.malformed, "refused": judged.refused,
    }  # fmt: skip


def _show(summary: Summary) -> None:
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
        say(f"without scores{', in one order or both' if swapped else ''}, and left out: {unscored}")
    for how in summary.settings:
        say("; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in how.items()))
