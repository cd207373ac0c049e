"""Having all cases judged: several at once, each once, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Final

from llavar_peft.evaluation.judge.judge_cases import Case
from llavar_peft.evaluation.judge.judge_client import Judge, JudgeConfig, JudgeVerdict
from llavar_peft.evaluation.judge.judge_reviews import Review

_REJECTED_IN_A_ROW: Final = 5  # after which it is the judge's settings that are wrong, not the questions


@dataclass(frozen=True, slots=True)
class Judged:
    """What a judge found.

    Attributes:
        reviews: One for each case, in order.
        sent: Replies that were asked for.
        known: Replies that an earlier run had.
        malformed: Replies without scores; they were asked for again.
        refused: Refusals, counted apart; they were asked for again, but for requests that the endpoint would not take.
    """

    reviews: tuple[Review, ...]
    sent: int
    known: int
    malformed: int
    refused: int


def judge_cases(
    cases: Sequence[Case],
    judge: Judge,
    *,
    swap: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Judged:
    """Has all cases judged.

    Args:
        cases: What to judge.
        judge: By whom.
        swap: Whether each is judged a second time with our answer shown first.
        progress: Called with (replies had, replies in all).

    Returns:
        The reviews. A case that no attempt gave scores for has none.

    Raises:
        ConfigError: The endpoint refuses, or will not take several requests in a row.
        EnvironmentFaultError: It cannot be reached. What was judged is kept; running again goes on from there.
    """
    tasks = [(case, swapped) for case in cases for swapped in ((False, True) if swap else (False,))]
    # The same question twice would be paid for twice, were both asked at once.
    prompts = list(dict.fromkeys(case.prompt(swapped=swapped) for case, swapped in tasks))
    with ThreadPoolExecutor(judge.config.concurrency) as pool:
        asked = {pool.submit(judge.ask, prompt): prompt for prompt in prompts}
        verdicts = _collect(asked, pool, progress)
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
    asked: dict[Future[JudgeVerdict], str], pool: ThreadPoolExecutor, progress: Callable[[int, int], None] | None
) -> dict[str, JudgeVerdict]:
    verdicts: dict[str, JudgeVerdict] = {}
    rejected = 0
    try:
        for done, future in enumerate(as_completed(asked), 1):
            verdict = verdicts[asked[future]] = future.result()
            rejected = rejected + 1 if verdict.rejection is not None else 0
            if verdict.rejection is not None and rejected == min(_REJECTED_IN_A_ROW, len(asked)):
                raise verdict.rejection
            if progress is not None:
                progress(done, len(asked))
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)  # those under way end, and are kept
        raise
    return verdicts


def _review(number: int, case: Case, verdict: JudgeVerdict, swapped: JudgeVerdict | None, judge: JudgeConfig) -> Review:
    how = {
        "judge_model": judge.model,
        "judge_temperature": judge.temperature,
        "judge_max_tokens": judge.max_tokens,
        **case.ours.how,
    }
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
        how=how,
    )
