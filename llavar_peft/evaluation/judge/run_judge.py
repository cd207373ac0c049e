"""Judge many cases, several at the same time and each prompt only once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Final

from llavar_peft.evaluation.judge.judge_cases import JudgeCase
from llavar_peft.evaluation.judge.judge_client import Judge, JudgeConfig, JudgeVerdict
from llavar_peft.evaluation.judge.judge_reviews import Review

_MAX_REJECTIONS: Final = 5  # in a row: then the configuration is wrong, not the questions


@dataclass(frozen=True, slots=True)
class Judged:
    """Reviews of all cases, and what they took.

    Attributes:
        reviews: One for each case, in order.
        sent: Number of requests that were answered.
        known: Number of prompts whose reply was kept from an earlier run.
        malformed: Number of replies that are neither scores nor refusals.
        refused: Number of refusals and rejected requests.
    """

    reviews: tuple[Review, ...]
    sent: int
    known: int
    malformed: int
    refused: int


def judge_cases(
    cases: Sequence[JudgeCase],
    judge: Judge,
    *,
    swap: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Judged:
    """Have all cases judged.

    Args:
        swap: Whether to judge each case a second time with our answer shown first.
        progress: Called with the number of verdicts so far and in total.

    Returns:
        The reviews. A case for which no reply contained scores has none.

    Raises:
        ConfigError: The endpoint denies access, or rejects several requests in a row.
        EnvironmentFaultError: The endpoint cannot be reached. Replies are kept: run again to resume.
    """
    tasks = [(case, swapped) for case in cases for swapped in ((False, True) if swap else (False,))]
    # Equal prompts are asked once: asked at the same time, each would be paid for.
    prompts = list(dict.fromkeys(case.prompt(swapped=swapped) for case, swapped in tasks))
    with ThreadPoolExecutor(judge.config.concurrency) as pool:
        futures = {pool.submit(judge.ask, prompt): prompt for prompt in prompts}
        verdicts = _collect(futures, pool, progress)
    reviews = [
        _review(
            number, case, verdicts[case.prompt()], verdicts[case.prompt(swapped=True)] if swap else None, judge.config
        )
        for number, case in enumerate(cases, 1)
    ]
    every = list(verdicts.values())
    return Judged(
        tuple(reviews),
        sent=sum(verdict.sent for verdict in every),
        known=sum(not verdict.sent for verdict in every),
        malformed=sum(verdict.malformed for verdict in every),
        refused=sum(verdict.refused for verdict in every),
    )


def _collect(
    futures: dict[Future[JudgeVerdict], str], pool: ThreadPoolExecutor, progress: Callable[[int, int], None] | None
) -> dict[str, JudgeVerdict]:
    verdicts: dict[str, JudgeVerdict] = {}
    rejected = 0
    try:
        for done, future in enumerate(as_completed(futures), 1):
            verdict = verdicts[futures[future]] = future.result()
            rejected = rejected + 1 if verdict.rejection is not None else 0
            if verdict.rejection is not None and rejected == min(_MAX_REJECTIONS, len(futures)):
                raise verdict.rejection
            if progress is not None:
                progress(done, len(futures))
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)  # requests in flight still finish and are kept
        raise
    return verdicts


def _review(
    number: int, case: JudgeCase, verdict: JudgeVerdict, swapped: JudgeVerdict | None, judge: JudgeConfig
) -> Review:
    other = swapped.scores if swapped is not None else None
    return Review(
        id=number,
        question_id=case.question_id,
        answer1_id=case.reference.id,
        answer2_id=case.ours.id,
        category=case.category,
        content=verdict.content,
        scores=verdict.scores,
        swapped_content=swapped.content if swapped is not None else None,
        swapped_scores=(other[1], other[0]) if other is not None else None,
        settings={
            "judge_model": judge.model,
            "judge_temperature": judge.temperature,
            "judge_max_tokens": judge.max_tokens,
            **case.ours.settings,
        },
    )
