"""What the figures say about the next step: each rule at its edges, silence under noise, and where it is shown."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest

from llavar_peft import cli
from llavar_peft.evaluation.report.write_report import ReportSettings, write_report
from llavar_peft.evaluation.vqa.answer_metrics import Score
from llavar_peft.evaluation.vqa.results_findings import find_in_all, find_in_results, name_resolution
from llavar_peft.evaluation.vqa.scored_results import (
    Answered,
    Figure,
    Results,
    Setting,
    rate,
    read_results,
    score_answers,
    write_results,
)
from llavar_peft.evaluation.vqa.vqa_questions import VqaQuestion
from llavar_peft.page.findings import (
    PartFigure,
    choose_findings,
    find_falling_loss,
    find_few_records,
    find_in_run,
    find_rising_loss,
    find_small_letters,
    find_weak_part,
)
from llavar_peft.page.run_log import ProbeLog, StageLog, StepLine


def stage(losses=(), held=(), exact=(), *, ended: bool = True, count: int = 1000) -> StageLog:
    """A stage with losses of steps, and probes at equal distances, the first before training."""
    gap = max(1, len(losses) // max(1, len(held) - 1))
    probes = tuple(
        ProbeLog(
            number * gap,
            "start" if number == 0 else "end" if ended and number == len(held) - 1 else "step",
            count,
            loss,
            exact[number] if exact else None,
        )
        for number, loss in enumerate(held)
    )
    steps = tuple(StepLine(number, loss) for number, loss in enumerate(losses, 1))
    return StageLog("one", Path(), steps, probes, ())


def noisy(count: int, slope: float, noise: float, seed: int = 0, alike: float = 0.0) -> list[float]:
    source, last, losses = random.Random(seed), 0.0, []
    for number in range(count):
        last = alike * last + source.gauss(0, noise) * math.sqrt(1 - alike**2)
        losses.append(2.0 + slope * number + last)
    return losses


@pytest.mark.parametrize(
    ("losses", "held", "exact", "found"),
    [
        (noisy(400, -0.002, 0.1), (), (), True),
        (noisy(400, -0.002, 0.1), (3.0, 2.0, 1.5), (), True),
        (noisy(400, -0.002, 0.1), (3.0, 1.5, 1.6), (), False),  # the held-out loss does not follow
        (noisy(400, -0.002, 0.1), (3.0, 2.0, 1.5), (0.0, 0.5, 1.0), False),  # nothing is left to learn
        (noisy(400, -0.0001, 0.1), (), (), False),  # less than 2 %
        (noisy(400, -0.0005, 0.8), (), (), False),  # less than the noise
        (noisy(400, 0.002, 0.1), (), (), False),
        ([3.0] * 400, (), (), False),
        ([3.0 - 0.01 * n for n in range(39)], (), (), False),  # too few steps
        ([3.0 - 0.01 * n for n in range(40)], (), (), True),  # a line without noise
        ([3.0, math.nan, math.inf] * 200, (), (), False),
        ([3.0 / (1 + n) ** 0.5 for n in range(400)], (), (), True),
        ([1.0 + 2.0 * math.exp(-n / 30) for n in range(400)], (), (), False),  # it falls no longer
    ],
)
def test_a_loss_that_still_falls(losses, held, exact, found: bool) -> None:
    finding = find_falling_loss(stage(losses, held, exact))
    assert (finding is not None) == found
    if finding is not None:
        assert finding.text.startswith("The training loss of one was still falling at its end, by ")
        assert finding.text.endswith("train longer (more epochs).")
    assert find_falling_loss(stage(losses, [3.0, 2.0], ended=False)) is None  # still running


@pytest.mark.parametrize("alike", [0.0, 0.7])
def test_noise_is_no_falling_loss(alike: float) -> None:
    """Neighboring steps may be alike, as those of similar records are."""
    found = [find_falling_loss(stage(noisy(400, 0.0, 0.5, seed, alike))) for seed in range(300)]
    assert sum(one is not None for one in found) <= 6


@pytest.mark.parametrize(
    ("held", "exact", "words"),
    [
        ((3.0, 2.0, 2.5), (), "lowest at step 200 (2.000) and rose to 2.500: stop earlier, near step 200"),
        ((3.0, 2.0, 2.19), (), ""),  # few values, and less than 10 %
        ((3.0, 2.0, 2.21), (), "near step 200"),
        ((2.0, 2.5), (), ""),  # two values are no curve
        ((2.0, 2.5, 3.0), (), "lowest before training (2.000) and rose to 3.000: check that the records"),
        ((3.0, 2.5, 2.0), (), ""),
        ((3.0, 2.0, 2.5), (0.0, 0.5, 0.6), ""),  # the answers still become better
        ((3.0, 2.0, 2.5), (0.0, 0.5, 0.5), "near step 200"),
        ((3.0, 2.4, 2.1, 2.0, 2.05, 2.15, 2.25), (), "near step 198"),
        ((3.0, 2.4, 2.1, 2.0, 2.0, 2.0, 2.1), (), ""),  # the last value alone
        ((2.0, 2.05, 1.98, 2.06, 1.99, 2.08, 2.07), (), ""),  # noise
        ((3.0, math.nan, 2.0, None, 2.5), (), "near step 200"),
    ],
)
def test_a_held_out_loss_that_rises(held, exact, words: str) -> None:
    finding = find_rising_loss(stage(range(400), held, exact))
    assert (finding is None) == (not words)
    assert finding is None or words in finding.text


def test_noise_is_no_rising_loss() -> None:
    found = [find_rising_loss(stage(range(400), noisy(9, 0.0, 0.05, seed))) for seed in range(300)]
    assert sum(one is not None for one in found) <= 12


@pytest.mark.parametrize(
    ("records", "low", "high", "words"),
    [
        (20, 0.0, 16.1, "20 records say little: the 95 % interval of exact is 0 to 16 %: about 120 would show it to "),
        (29, 0.0, 5.0, "29 records say little"),
        (30, 0.0, 20.0, ""),
        (30, 0.0, 20.1, "30 records say little"),
        (1, 5.5, 100.0, "1 record say little"),
        (0, 0.0, 0.0, ""),
        (5000, 20.0, 22.0, ""),
        (500, 40.0, 61.0, "500 records say little: the 95 % interval of exact is 40 to 61 %."),  # of few images
    ],
)
def test_few_records(records: int, low: float, high: float, words: str) -> None:
    finding = find_few_records("exact", records, low, high)
    assert (finding is None) == (not words)
    assert finding is None or finding.text.startswith(words)


def part(value: float, half: float, rest: float, rest_half: float = 2.0, records: int = 50, name: str = "x"):
    return PartFigure(
        "script", name, records, value, value - half, value + half, rest, rest - rest_half, rest + rest_half
    )


@pytest.mark.parametrize(
    ("one", "compared", "found"),
    [
        (part(20, 10, 60), 1, True),
        (part(20, 10, 60, records=9), 1, False),
        (part(51, 4, 60), 1, False),  # not far enough
        (part(50, 7, 60), 1, True),
        (part(50, 8, 60), 1, False),  # the intervals meet
        (part(50, 7, 60), 50, False),  # the worst of fifty
        (part(20, 10, 60), 50, True),
        (part(60, 3, 20), 1, False),
    ],
)
def test_a_part_far_below_the_rest(one: PartFigure, compared: int, found: bool) -> None:
    finding = find_weak_part([one, part(58, 1, 60)], compared, "do this")
    assert (finding is not None) == found
    if found:
        assert finding is not None
        assert finding.text.startswith(f"script x is far below the rest: {one.value:.0f} % (")
        assert finding.text.endswith(": do this.")


def test_the_weakest_part_is_named() -> None:
    finding = find_weak_part([part(40, 5, 60, name="a"), part(10, 5, 60, name="b")], 9, "do this")
    assert finding is not None
    assert "script b" in finding.text


@pytest.mark.parametrize(
    ("one", "known", "found"),
    [(part(10, 5, 60), 500, True), (part(10, 5, 60), 1001, False), (part(40, 20, 60), 500, False), (None, 500, False),
     (part(10, 5, 60, records=9), 20, False)],
)  # fmt: skip
def test_small_letters(one: PartFigure | None, known: int, found: bool) -> None:
    finding = find_small_letters(one, known, 7.0, 2.0)
    assert (finding is not None) == found
    if found:
        known_setting = find_small_letters(one, known, 7.0, 2.0, "resolution: {type: tiles}")
        assert finding is not None
        assert "shows them 2.0 times as large would" in finding.text
        assert known_setting is not None
        assert known_setting.text.endswith("To read them, put resolution: {type: tiles} under model: in the recipe.")


def test_at_most_three_are_chosen_in_order_of_use() -> None:
    few, small = find_few_records("a", 3, 0, 50), find_small_letters(part(10, 5, 60), 500, 7.0, 2.0)
    weak, rising = find_weak_part([part(20, 10, 60)], 1, "do this"), find_rising_loss(stage(range(9), (3.0, 2.0, 2.5)))
    assert [one.kind for one in choose_findings([few, weak, None, small, small, rising])] == ["rising", "small", "weak"]


def questions(count: int, right, **fields) -> list[VqaQuestion]:
    return [
        VqaQuestion(
            str(number), "Q?", ("TEXT",), f"{number}.png", "TEXT" if right(number) else "no",
            {key: value(number) for key, value in fields.items()},
            text_height=5.0 if number % 4 == 0 else 20.0, size=(336, 336),
        )
        for number in range(count)
    ]  # fmt: skip


def scored(asked: list[VqaQuestion], name: str = "d.json") -> Results:
    measures = {one.id: (one.text_height, None) for one in asked}
    return score_answers(asked, name, Setting(), ("multimodalocr", "anls", "cer"), measures)


def test_findings_of_results(tmp_path: Path) -> None:
    small = questions(200, lambda number: number % 4 > 0 and number % 3 > 0)
    (finding,) = find_in_results(scored(small), "multimodalocr")
    assert finding.text.startswith("25 % of the answers stand in letters below 7 px of the tower's input: 0 % of these")
    line = name_resolution(small, 336, "pad", None)
    assert line is not None
    assert line.startswith("resolution: {")
    named = replace(scored(small), resolution=line)
    assert f"put {line} under model" in find_in_results(named, "anls")[0].text
    write_results(named, tmp_path / "named.json")
    assert read_results(tmp_path / "named.json").resolution == line
    assert not find_in_results(scored(small), "cer")
    source = ("photo", "scan", "screen")
    weak = questions(240, lambda number: number % 3 != 1 and number % 5 > 0, source=lambda number: source[number % 3])
    (finding,) = find_in_results(scored(weak), "multimodalocr")
    assert finding.text.startswith("source scan is far below the rest: 0 % (0 to 5) against 80 % (")
    even = questions(240, lambda number: number % 7 > 1, source=lambda number: source[number % 3])
    assert not find_in_results(scored(even), "multimodalocr")
    both = find_in_all([(scored(weak, "one.json"), "anls"), (scored(questions(9, bool), "two.json"), "anls")])
    assert [one.text.split(":")[0] for one in both] == ["one", "two"]


def test_findings_of_fields() -> None:
    def record(number: int) -> Answered:
        names = {"field date": number % 9 > 0, "field total": number % 6 == 0, "field store": number % 8 > 0}
        scores = {"fields F1": Score(2.0, 4.0), **{name: Score(float(right)) for name, right in names.items()}}
        return Answered(str(number), "Q?", "{}", ("{}",), scores={**scores, "field total F1": Score(0.0)})

    records = tuple(map(record, range(60)))
    figures = tuple(Figure(name, *rate(records, name), 60, False, Setting()) for name in records[0].scores)
    (finding,) = find_in_results(Results("d", Setting(), figures, records), "fields F1")
    assert finding.text.startswith("field total is far below the rest: 17 % (")
    assert finding.text.endswith("add more records that have it.")


def test_findings_are_shown_where_figures_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the beginning of both pages, and after the figures that a command prints, on stderr."""
    folder = tmp_path / "run" / "one"
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"step": n, "loss": loss}) + "\n" for n, loss in enumerate(noisy(400, -0.002, 0.1), 1)
        )
    probe = {"step": 400, "when": "end", "count": 20, "exact_match": 0.0}
    (folder / "probe.jsonl").write_text(json.dumps(probe) + "\n")
    rows = [{"question": "Q?", "answers": ["A<b>"], "prediction": "no", "question_id": n} for n in range(20)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    out = tmp_path / "run" / "d.results.json"
    assert cli.main(["eval", "vqa", "--predictions", str(tmp_path / "data.json"), "--out", str(out)]) == 0
    said = capsys.readouterr()
    few = "20 records say little: the 95 % interval of multimodalocr is 0 to 16 %"
    assert f"next: {few}" in said.err
    assert few not in said.out
    assert [one.kind for one in find_in_run([])] == []
    page = write_report(tmp_path / "run", settings=ReportSettings()).read_text(encoding="utf-8")
    begin = page[: page.index("<section")]
    assert "was still falling at its end" in begin
    assert few in begin
    assert "20 held-out images say little" not in begin  # the results say how many records they have
    from llavar_peft.page.run_page import write_run_page

    begin = write_run_page(tmp_path / "run").read_text(encoding="utf-8").split("<section")[0]
    assert "was still falling at its end" in begin
    assert "20 held-out images say little" in begin
    assert few not in begin
