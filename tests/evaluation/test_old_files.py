"""Files that version 0.1 wrote can still be read.

tests/fixtures/answers_by_0_1 was written by ``eval vqa``, ``generate`` and ``eval answer`` of 0.1 with the tiny model
and two images (``--greedy --max-new-tokens 4``).
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from llavar_peft import cli
from llavar_peft.evaluation.vqa.answer_settings import read_setting
from llavar_peft.evaluation.vqa.scored_results import read_results, score_answers
from llavar_peft.evaluation.vqa.vqa_questions import read_predictions
from llavar_peft.inference.question_file import earlier_answers, read_question_file

OLD = Path(__file__).parents[1] / "fixtures/answers_by_0_1"


def test_results_are_read_and_scored_the_same() -> None:
    results = read_results(OLD / "vqa.results.json")
    assert [record.answer for record in results.records] == ["p", "p"]
    answered = read_predictions(OLD / "vqa.results.answers.jsonl")
    again = score_answers(answered, results.dataset, results.setting)
    before, now = ([dataclasses.replace(one, low=0.0, high=0.0) for one in each.figures] for each in (results, again))
    assert now == before
    # 0.1 gave shares without variation an interval without width.
    assert {(one.low, round(one.high)) for one in again.figures if one.protocol == "multimodalocr"} == {(0.0, 66)}


@pytest.mark.parametrize("name", ["vqa.results.answers.jsonl", "judge.answers.jsonl"])
def test_a_file_of_answers_gives_its_setting(name: str) -> None:
    setting = read_setting(OLD / name)
    assert (setting.model_hash, setting.prompt, setting.image_mode) == ("c4b1aed2a9d87e45", "{question}", "pad")
    assert (setting.temperature, setting.max_new_tokens) == (0.0, 4)


@pytest.mark.parametrize("name", ["vqa.results.answers.jsonl", "model.answers.jsonl", "judge.answers.jsonl"])
def test_answers_are_predictions(name: str) -> None:
    dataset = None if name.startswith("vqa") else OLD / "dataset.json"
    assert [one.answer for one in read_predictions(OLD / name, dataset)] == ["p", "p"]


def test_generated_answers_are_kept() -> None:
    questions = read_question_file(OLD / "questions.jsonl")
    assert [one["text"] for one in earlier_answers(OLD / "model.answers.jsonl", questions, "m")] == ["p", "p"]


def test_a_report_shows_old_results(tmp_path: Path) -> None:
    shutil.copy(OLD / "vqa.results.json", tmp_path / "before.json")
    page = tmp_path / "page.html"
    command = ["report", "--results", str(OLD / "vqa.results.json"), "--before", str(tmp_path / "before.json")]
    assert cli.main([*command, "--out", str(page)]) == 0
    assert "previous run</th>" in page.read_text()
